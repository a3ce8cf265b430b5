"""House rules: one source for every fact, modules that import alone and in order, notebooks as the committed package says."""
import configparser
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT / "sharp_distill").glob("[a-z]*.py"))


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def module_of(path):
    "The module a notebook exports, or None."
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(source(c) for c in cells(path)), re.M)
    return found and found.group(1)


def test_settings_agree():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for key in ("lib_path", "nbs_path", "doc_path", "title", "tst_flags"): assert ini["DEFAULT"][key] == toml["tool"]["nbdev"][key], key
    assert toml["project"]["name"] == ini["DEFAULT"]["lib_name"]
    assert toml["project"]["requires-python"] == ">=" + ini["DEFAULT"]["min_python"]
    assert f'__version__ = "{ini["DEFAULT"]["version"]}"' in (ROOT / "sharp_distill/__init__.py").read_text()


def test_requirements_are_pinned():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    named = (ini["DEFAULT"]["requirements"] + " " + ini["DEFAULT"]["dev_requirements"]).split()
    pins = {line.split("==")[0].strip().lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    missing = [r for r in named if re.match(r"[\w.-]+", r).group(0).lower().replace("_", "-") not in pins]
    assert not missing


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_alone(name):
    done = subprocess.run([sys.executable, "-c", f"import sharp_distill.{name}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_imports_go_to_lower_numbers():
    order = {module_of(p): k for k, p in enumerate(NBS) if module_of(p)}
    for path in NBS:
        me = module_of(path)
        if not me: continue
        text = (ROOT / "sharp_distill" / f"{me}.py").read_text(encoding="utf-8")
        for other in re.findall(r"^\s*from \.(\w+) import|^\s*from sharp_distill\.(\w+) import", text, re.M):
            name = other[0] or other[1]
            assert name == me or order[name] < order[me], f"{path.name} imports {name}, which comes later"


def test_notebooks_carry_outputs_and_no_private_paths():
    for path in NBS:
        code = [c for c in cells(path) if c["cell_type"] == "code" and source(c).strip()]
        assert any(c["outputs"] for c in code), f"{path.name} was not executed"
        text = path.read_text(encoding="utf-8")
        for private in ("/root/", "/home/", "/work/", str(ROOT)): assert private not in text, f"{path.name} holds {private}"


def test_run_notebooks_define_no_functions():
    for path in NBS:
        if module_of(path) or path.stem == "index": continue
        for c in cells(path):
            if c["cell_type"] == "code": assert not re.search(r"^def |^class ", source(c), re.M), f"{path.name}: {source(c)[:60]}"


def test_readme_is_made_from_index():
    done = subprocess.run([sys.executable, "tools/readme.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_parameters_cell_is_tagged():
    tagged = [c for c in cells(ROOT / "nbs/run.ipynb") if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and 'dataset: str = "sample"' in source(tagged[0])


def test_export_and_clean_change_nothing(tmp_path):
    "Run both on a copy of the tracked files and compare."
    env = {k: v for k, v in os.environ.items()}
    copy = tmp_path / "copy"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(copy)], check=True) if (ROOT / ".git").exists() else pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-m", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, listed): # what is not committed yet is tested as it stands
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists(): target.write_bytes((ROOT / name).read_bytes())
        else: target.unlink(missing_ok=True)
    read = lambda: {p.relative_to(copy): p.read_bytes() for p in [*copy.glob("nbs/*.ipynb"), *copy.glob("sharp_distill/*.py")]}
    before = read()
    bin_dir = Path(sys.executable).parent
    for command in ("nbdev_export", "nbdev_clean"): subprocess.run([bin_dir / command], cwd=copy, env=env, check=True, capture_output=True)
    after = read()
    changed = [str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    assert not changed
