"""Build the documentation site from the notebooks as they are stored: python tools/docs.py [folder].

Nothing is executed, nothing is fetched.
"""
import argparse
import ast
import html
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUPS = {"Start": r"index|run$|explore|bring|csv_to|web_service", "Basics": r"0", "Data": r"1", "Text": r"2",
          "Models": r"3", # heading -> names of its notebooks; the first match wins
          "Serving": r"4", "Experiments": r"5", "Application": r"6", "Results": r""}
CONF = """
project, html_title, copyright = "SHARP-Distill", "SHARP-Distill", "the SHARP-Distill workbook authors, MIT licence"
extensions, root_doc, html_theme = ["myst_nb", "sphinx_copybutton"], "index", "furo"
nb_execution_mode, nb_render_markdown_format, nb_ipywidgets_js = "off", "myst", {}
myst_heading_anchors, html_static_path, html_css_files = 4, ["."], ["site.css"]
html_show_sourcelink, html_copy_source, templates_path = False, False, []
nb_mime_priority_overrides = [("*", "text/html", 0), ("*", "image/png", 1)]
"""
CSS = """
.cell_output img { background: #fff; border-radius: 4px; max-width: 100% }
.content { width: 54em } .content img { background: #fff }
.cell_output table { font-size: var(--font-size--small); display: block; overflow-x: auto }
.cell_output table { border: 0; border-collapse: collapse }
.cell_output :is(td, th) { border: 0; border-bottom: 1px solid #8884; padding: .15em .6em }
div.math { overflow-x: auto; margin: 1em 0; text-align: center } math { font-size: 1.1em }
a.source { font-size: var(--font-size--small) }
"""


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def groups(nbs=ROOT / "nbs") -> dict: # Heading -> notebooks in reading order
    "Sort the notebooks into the sidebar by their names."
    out = {g: [] for g in GROUPS}
    for path in sorted(nbs.glob("[!_.]*.ipynb"), key=lambda p: (p.stem != "index", not p.stem[0].isdigit(), p.stem)):
        out[next(g for g, pattern in GROUPS.items() if re.match(pattern, path.stem))].append(path)
    return {g: paths for g, paths in out.items() if paths}


def module_of(path): # The module a notebook exports, or None
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells(path))), re.M)
    return found and found.group(1)


TEX = (r"(?P<code>^```.*?^```|^~~~.*?^~~~|(?P<tick>`+).+?(?P=tick)(?!`))"
       r"|\$\$(?P<block>.+?)\$\$"
       r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])")


def mathml(text: str) -> str: # Markdown
    "Turn TeX outside code into MathML, so that no page needs a script for it."
    from latex2mathml.converter import convert
    def one(found):
        if not (tex := found["block"] or found["inline"]): return found[0]
        block = "block" if found["block"] else "inline"
        out = re.sub(r"[*_|`\[\]]", lambda c: f"&#{ord(c[0])};", convert(tex.strip(), display=block)).replace("\n", " ")
        return f'\n\n<div class="math">{out}</div>\n\n' if found["block"] and "\n\n" not in tex else out
    return re.sub(TEX, one, text, flags=re.S | re.M)


def names_in(code: str) -> list: # Public functions and classes defined in a cell
    return [n.name for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]


SHOWN = ("image/png", "image/jpeg", "image/svg+xml", "text/html", "text/markdown", "text/plain")
ACTIVE = r"<\s*(script|iframe|object|embed|link|meta|base|form)\b|<[^>]*\s(on\w+\s*=|(href|src)\s*=\W*javascript:)"


def safe(output: dict) -> dict: # An output that a page may show
    """Keep what comes from data from acting on the site: a data set may be named like a directive or a script.

    Markdown is turned into HTML here, with its raw HTML as text, so that MyST never reads it; HTML that acts gives
    way to the plain text beside it.
    """
    from markdown_it import MarkdownIt
    if "data" not in output: return output
    data = {k: v for k, v in output["data"].items() if k in SHOWN}
    if "text/markdown" in data:
        made = MarkdownIt("commonmark", {"html": False}).enable("table").render("".join(data.pop("text/markdown")))
        data["text/html"] = re.sub(r'(href="[\w.+-]+)\.ipynb', r"\1.html", made)
    if re.search(ACTIVE, "".join(data.get("text/html", "")), re.I): del data["text/html"]
    return output | dict(data=data)


def page(path) -> dict: # A notebook
    "Make a notebook ready for the site: no hidden cells, no directives, no widgets, an anchor before every definition."
    nb, out = json.loads(path.read_text(encoding="utf-8")), []
    for cell in nb["cells"]:
        text = source(cell)
        directives, body = set(re.findall(r"^#\|\s*(.+?)\s*$", text, re.M)), re.sub(r"^#\|.*\n?", "", text,
                                                                                    flags=re.M).strip("\n")
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\[([^]]+)\]\(\.\./tests/[\w.]+\)", r"`\1`", text) # the site has no tests
            out.append({**cell, "source": mathml(text)})
            continue
        if cell["cell_type"] != "code" or "hide" in directives or not body: continue
        if "export" in directives and (names := names_in(body)):
            out.append(dict(cell_type="markdown", metadata={},
                            source="".join(f'<span id="def-{n}"></span>' for n in names)))
        kept = [safe(o) for o in cell["outputs"]
                if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        tags = [*cell["metadata"].get("tags", []), *(["remove-input"] if "echo: false" in directives else [])]
        out.append({**cell, "source": body, "outputs": kept, "metadata": {"tags": tags}})
    for c in out: c.pop("id", None)
    kernel = dict(display_name="python3", language="python", name="python3")
    return dict(nb, cells=out, metadata=dict(kernelspec=kernel, language_info=dict(name="python")), nbformat=4,
                nbformat_minor=4)


def signature(node, lines) -> str: # The source of a definition, down to where its body begins
    "Cut a signature, with the comments beside its parameters; of a class also its fields."
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
    after = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))][-1]
                for n in (methods or after or node.body)) if isinstance(node,
                    ast.FunctionDef) or methods else node.end_lineno + 1
    text = "\n".join(lines[node.lineno - 1:max(first - 1, node.lineno)])
    if doc := ast.get_docstring(node, clean=False): text = re.sub(r'\n\s*"+' + re.escape(doc) + r'"+', "", text)
    if first <= node.lineno: text = re.sub(r":\s*(?:return\b|\".*).*$", ":", lines[node.lineno - 1]) # a one-liner
    return re.sub(r"\n\s*@[^\n]*$", "", text.rstrip())


def source_of(module: str) -> str: # "data.files"
    return (ROOT / "sharp_distill" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


def api(path) -> str: # Markdown of one module
    "List a module's public functions and classes with signature, parameters and a link to where they are made."
    module = module_of(path)
    code = source_of(module)
    parts, lines = [f"# {module}", ast.get_docstring(ast.parse(code)) or ""], code.splitlines()
    for node in ast.parse(code).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        parts += [f"## {node.name}", f"```python\n{signature(node, lines)}\n```",
                  (ast.get_docstring(node) or "").replace("`", "``").replace("``", "`"),
                  f'<a class="source" href="../{path.stem}.html#def-{html.escape(node.name)}">source and '
                  'explanation</a>']
    return "\n\n".join(parts) + "\n"


def toctree(caption, entries) -> str:
    return "```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(entries) + "\n```\n"


def write_sources(folder: Path):
    "Write what Sphinx reads."
    everything = groups()
    for path in sum(everything.values(), []):
        nb = page(path)
        if path.stem == "index":
            trees = [toctree(g, [p.stem for p in ps if p.stem != "index"]) for g,
                     ps in everything.items()] + [toctree("API", ["api/index"])]
            nb["cells"].append(dict(cell_type="markdown", metadata={}, source="\n".join(trees)))
        (folder / path.name).write_text(json.dumps(nb), encoding="utf-8")
    modules = [p for ps in everything.values() for p in ps if module_of(p)]
    modules.sort(key=lambda p: p.stem)
    (folder / "api").mkdir()
    for p in modules: (folder / "api" / f"{module_of(p)}.md").write_text(api(p), encoding="utf-8")
    rows = "\n".join(f"- [{m}]({m}.md): {ast.get_docstring(ast.parse(source_of(m)))}" for m in map(module_of, modules))
    (folder / "api/index.md").write_text(f"# Modules\n\n{rows}\n\n```{{toctree}}\n:hidden:\n\n"
                                         + "\n".join(map(module_of, modules)) + "\n```\n", encoding="utf-8")
    if (ROOT / "nbs/figures").exists(): shutil.copytree(ROOT / "nbs/figures", folder / "figures")
    (folder / "conf.py").write_text(CONF, encoding="utf-8")
    (folder / "site.css").write_text(CSS, encoding="utf-8")


def sidebar() -> str: # nbs/sidebar.yml, for those who build with Quarto and nbdev_docs
    body = "".join(f"      - section: {g}\n        contents:\n" + "".join(f"          - {p.name}\n" for p in ps) for g,
                   ps in groups().items())
    return "website:\n  sidebar:\n    contents:\n" + body


def build(out: Path) -> int: # Sphinx's exit status
    "Write the sidebar and build the site; a warning is an error."
    from sphinx.cmd.build import main
    (ROOT / "nbs/sidebar.yml").write_text(sidebar(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as tmp:
        (pages := Path(tmp) / "pages").mkdir()
        write_sources(pages)
        failed = main(["-W", "--keep-going", "-q", "-b", "html", "-d", f"{tmp}/doctrees", str(pages), f"{tmp}/html"])
        if not failed:
            shutil.rmtree(out, ignore_errors=True)
            shutil.move(f"{tmp}/html", out)
        return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "_docs", help="where the site is written")
    sys.exit(build(parser.parse_args().folder))
