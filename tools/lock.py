"""The files that CI installs, by their SHA-256.

    PIP_REPORT=report.json pip install -e ".[dev]" -c constraints.txt
    python tools/lock.py report.json            # writes requirements.lock
    python tools/lock.py --check report.json    # compares; a file that is not in it is an error

Wheels run nothing when they are installed, so a check between installing and the first import is early enough.
Only the standard library is imported: `python -I -S tools/lock.py` loads nothing of what was installed.
"""
import json
import re
import sys
from pathlib import Path

LOCK = Path(__file__).parent.parent / ".ci/requirements.lock"
HERE = f"{sys.implementation.cache_tag} {sys.platform} {__import__('platform').machine()}" # wheels differ by these


def installed(report: dict) -> dict: # "name==version" -> sha256
    "Read pip's report of an installation; this project itself, which is a folder, is left out."
    out = {}
    for item in report["install"]:
        if "archive_info" not in item["download_info"]: continue
        about = item["metadata"]
        name, version = re.sub(r"[-_.]+", "-", about["name"]).lower(), about["version"].partition("+")[0]
        out[f"{name}=={version}"] = item["download_info"]["archive_info"]["hashes"]["sha256"]
    return dict(sorted(out.items()))


def text(files: dict) -> str: # Of requirements.lock, which `pip install --require-hashes --no-deps -r` reads, too
    return "\n".join([f"# {HERE}; written by tools/lock.py", *(f"{n} --hash=sha256:{s}" for n, s in files.items()), ""])


def faults(files: dict, lock: str) -> list: # Lines; empty: every file is the one in the lock
    known = dict(re.findall(r"^(\S+) --hash=sha256:(\w+)$", lock, re.M))
    odd = {n: "is not in it" if n not in known else "has another hash" for n, s in files.items() if known.get(n) != s}
    return [f"requirements.lock: {n} {why}" for n, why in odd.items()]


def main(words: list) -> int: # Exit status
    if not words or not Path(words[-1]).is_file(): sys.exit(__doc__)
    files = installed(json.loads(Path(words[-1]).read_text(encoding="utf-8")))
    if words[0] != "--check": LOCK.write_text(text(files), encoding="utf-8"); return 0
    lock = LOCK.read_text(encoding="utf-8")
    if not lock.startswith(f"# {HERE};"): print(f"requirements.lock is not of {HERE}: nothing was checked"); return 0
    found = faults(files, lock)
    print(*found or [f"{len(files)} files are those of requirements.lock"], sep="\n")
    return bool(found)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
