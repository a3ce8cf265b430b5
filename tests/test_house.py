"""House rules: one source for every fact, rooms in order, short cells and lines, the field's words, options with one name."""
import ast
import configparser
import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

NBS = sorted((ROOT / "nbs").glob("*.ipynb"))
COMPONENTS = [p for p in NBS if p.stem[0].isdigit()]
PACKAGE = ROOT / "sharp_distill"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
WORDS = """ruler rulers rival rivals untaught taught pupil dealt newcomer newcomers crowd verdict verdicts decider deciders knob knobs
           shelf arrivals emphasis owned climb judge judges judged whole_shop spectral_start take_turns taking_turns""".split()


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def code(path): return [c for c in cells(path) if c["cell_type"] == "code" and source(c).strip()]
def exported(cell): return bool(re.search(r"^#\|\s*exports?\b", source(cell), re.M))
def length(cell): return sum(bool(line.strip()) and not line.startswith("#|") for line in source(cell).split("\n"))
def only_imports(cell): return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source(cell)).body)


def module_of(path): # "data.files", or None
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells(path))), re.M)
    return found and found.group(1)


def settings():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def test_settings_agree():
    ini, toml = settings(), tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for key in ("lib_path", "nbs_path", "doc_path", "title", "tst_flags"): assert ini[key] == toml["tool"]["nbdev"][key], key
    assert toml["project"]["name"] == ini["lib_name"]
    assert toml["project"]["requires-python"] == ">=" + ini["min_python"]
    assert f'__version__ = "{ini["version"]}"' in (PACKAGE / "__init__.py").read_text()


def test_requirements_are_pinned():
    named = (settings()["requirements"] + " " + settings()["dev_requirements"]).split()
    pins = {line.split("==")[0].strip().lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert not [r for r in named if re.match(r"[\w.-]+", r).group(0).lower().replace("_", "-") not in pins]


def test_the_lock_holds_the_pins_and_nothing_else():
    "requirements.lock carries a hash for every pin but pip itself, which comes with Python."
    sys.path.insert(0, str(ROOT / "tools"))
    import lock
    pins = {line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("pip==")}
    text = lock.LOCK.read_text(encoding="utf-8")
    files = dict(re.findall(r"^(\S+) --hash=sha256:([0-9a-f]{64})$", text, re.M))
    assert files.keys() == pins, "install anew and run tools/lock.py"
    assert lock.faults(files, text) == [] and text.endswith(lock.text(files).split("\n", 1)[1])
    item = lambda version, sha: dict(metadata=dict(name="Fast_Core", version=version), download_info=dict(archive_info=dict(hashes=dict(sha256=sha))))
    here = dict(metadata=dict(name="sharp_distill", version="1"), download_info=dict(dir_info=dict(editable=True)))
    got = lock.installed(dict(install=[item("1.0+cpu", "ab"), here]))
    assert got == {"fast-core==1.0": "ab"} and lock.faults(got, lock.text(got)) == []
    assert lock.faults(got, lock.text({"fast-core==1.0": "cd"})) == ["requirements.lock: fast-core==1.0 has another hash"]
    assert lock.faults(got, text) == ["requirements.lock: fast-core==1.0 is not in it"]


def test_the_file_order_is_the_import_order():
    order = {module_of(p): k for k, p in enumerate(COMPONENTS)}
    assert list(order) and None not in order
    for path in COMPONENTS:
        me = module_of(path)
        assert path.stem == f"{path.stem[:2]}_{me}", f"{path.name} exports {me}"
        tree = ast.parse((PACKAGE / (me.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        for f in ast.walk(tree): # `TeacherConfig.published()` and its like name a form that is defined later
            if isinstance(f, ast.FunctionDef) and f.name == "published": f.body = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom): continue
            base = me.split(".")[:-node.level] if node.level else []
            if not node.level and not (node.module or "").startswith("sharp_distill"): continue
            dotted = ".".join([*base, *((node.module or "").removeprefix("sharp_distill").lstrip(".").split(".") if node.module else [])]).strip(".")
            for name in [dotted] if dotted in order else [f"{dotted}.{a.name}".strip(".") for a in node.names]:
                if name in order: assert order[name] < order[me], f"{path.name} imports {name}, which comes later"


def test_every_module_imports_alone():
    "In one process, the modules of this package forgotten before each; then once more without what Windows lacks."
    names = [".".join(("sharp_distill", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in MODULES]
    program = ("import importlib, sys\nfor name in sys.argv[1:]:\n    for k in [k for k in sys.modules if k.split('.')[0] == 'sharp_distill']: del sys.modules[k]\n"
               "    importlib.import_module(name)\nimport psutil\nfor k in [k for k in sys.modules if k.split('.')[0] == 'sharp_distill']: del sys.modules[k]\n"
               "sys.modules.update(resource=None, fcntl=None, pwd=None, grp=None, termios=None)\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
               "from sharp_distill.core import peak_mib\nassert peak_mib() > 1\nprint('all')")
    done = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "all", done.stderr[-2000:]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_short_and_narrow(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, f"{len(text.splitlines())} lines"
    text = text.split("\n", 1)[1] # the notebook's summary line
    ours = re.sub(r"^__all__ = \[.*?\]$|^# %%.*$", "", text, flags=re.M | re.S) # nbdev writes these
    assert not [line for line in ours.splitlines() if len(line) > 120]


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_component_notebooks(path):
    "Short exported cells, a lesson after at most three of them, prose, checks, and a summary line."
    every = code(path)
    ours = [c for c in every if exported(c)]
    assert max(map(length, ours)) <= 40 and sorted(map(length, ours))[len(ours) // 2] <= 20
    row = 0
    for c in every:
        row = 0 if not exported(c) else row if only_imports(c) else row + 1
        assert row <= 3, f"{row} exported cells in a row before a lesson: {source(c)[:80]}"
    words = sum(len(source(c).split()) for c in cells(path) if c["cell_type"] == "markdown")
    assert words / sum(map(length, every)) >= 1.2, "too little prose"
    assert sum("assert" in source(c) for c in every) >= .12 * len(every), "too few checks"
    assert sum("#| hide" in source(c) for c in every) <= .1 * len(every) + 1


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_every_notebook(path):
    "Narrow lines, a title with a summary, stored outputs, no private path, the field's words."
    first, every, text = source(cells(path)[0]), code(path), path.read_text(encoding="utf-8")
    assert re.match(r"# .+\n\n> \S.+", first), "no title with a summary line"
    assert not [line for c in every for line in source(c).split("\n") if len(line) > 120]
    assert any(c["outputs"] for c in every), "was not executed"
    drawn = [c for c in every if re.search(r"\bplot_\w+\(", source(c)) and not source(c).startswith("#| export")]
    assert not [c["id"] for c in drawn if not any("image/png" in o.get("data", {}) for o in c["outputs"])], "lacks a figure"
    for private in ("/root/", "/home/", "/work/", str(ROOT)): assert private not in text, f"holds {private}"
    said = "\n".join(map(source, cells(path))).lower()
    assert not [w for w in WORDS if re.search(rf"\b{w.replace('_', ' ')}\b", said)]


def test_every_notebook_links_to_notebooks_that_exist():
    for path in NBS:
        for name in re.findall(r"\]\(([\w.+-]+\.ipynb)\)", "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")):
            assert (ROOT / "nbs" / name).exists(), f"{path.name} links to {name}"


def test_promises_link_tests_that_exist():
    links = re.findall(r"\]\(\.\./(tests/[\w.]+)\)", "\n".join(source(c) for p in NBS for c in cells(p)))
    assert len(set(links)) >= 8 and not [name for name in links if not (ROOT / name).exists()]


def test_run_notebooks_define_no_functions():
    for path in NBS:
        if path in COMPONENTS or path.stem == "index": continue
        files = [c for c in code(path) if source(c).startswith("%%writefile")] # a file that the page writes is an example
        for c in code(path): assert c in files or not re.search(r"^def |^class ", source(c), re.M), f"{path.name}: {source(c)[:60]}"


CONFIGS = dict(run="experiments.run.RunConfig", ablation="experiments.studies.AblationConfig", sensitivity="experiments.studies.SensitivityConfig",
               scalability="experiments.studies.ScalabilityConfig", reproduce="experiments.studies.ReproduceConfig",
               leaderboard="experiments.board.BoardConfig", carry_over="experiments.carry_over.CarryOverConfig", speed_report="experiments.speed.SpeedConfig")


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_cells_are_their_configs(name):
    "Each parameter has the name and the default of the option it sets, and a comment for papermill's help."
    import importlib
    module, _, kind = CONFIGS[name].rpartition(".")
    known = getattr(importlib.import_module(f"sharp_distill.{module}"), kind)().flat()
    tagged = [c for c in cells(ROOT / f"nbs/{name}.ipynb") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in source(tagged[0]).splitlines() if line.strip()]
    for line in lines: assert re.match(r"\w+: \w+ = .+ # \S", line), f"not `name: type = value # help`: {line}"
    for node in ast.parse(source(tagged[0])).body:
        option, value = node.target.id, ast.literal_eval(node.value)
        assert option in known and known[option] == value, f"{option}: the cell says {value!r}, the config {known.get(option)!r}"


def test_no_config_is_long():
    import importlib
    import inspect
    from sharp_distill.core import Config
    for path in MODULES:
        module = importlib.import_module(".".join(("sharp_distill", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Config) and kind.__module__ == module.__name__:
                n = len(dataclasses.fields(kind))
                assert n <= (20 if path.stem == "published" else 16), f"{name} has {n} fields" # the switches add to a whole config


def test_figures_are_drawn_in_one_place():
    for path in MODULES:
        if path.parent.name == "plots": continue
        assert not re.search(r"^def plot_", path.read_text(encoding="utf-8"), re.M), path.name


def test_readme_is_made_from_index():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900, "the README is longer than a screen"


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "-q", "tests", "tools", "sharp_distill"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:]


def test_export_and_clean_change_nothing(tmp_path):
    "Run both on a copy of the files as they stand, and compare."
    copy = tmp_path / "copy"
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True)
    listed = subprocess.run(["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, listed): # what is not committed yet is tested as it stands
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists(): target.write_bytes((ROOT / name).read_bytes())
        else: target.unlink(missing_ok=True)
    read = lambda: {p.relative_to(copy): p.read_bytes() for p in [*copy.glob("nbs/*.ipynb"), *copy.glob("sharp_distill/**/*.py")]}
    before = read()
    program = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    subprocess.run([sys.executable, "-c", program], cwd=copy, env={**os.environ}, check=True, capture_output=True)
    after = read()
    assert not [str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
