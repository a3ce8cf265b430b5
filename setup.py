"""Hands settings.ini to setuptools: one place for name, version, requirements and console scripts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


class BuildWithNotebooks(build_py):
    "Put the run notebooks, which are the commands, beside the modules; a clone has them in nbs/."
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return
        place = Path(self.build_lib) / cfg["lib_path"] / "notebooks"
        self.mkpath(str(place))
        for path in sorted((here / cfg["nbs_path"]).glob("[a-z]*.ipynb")):
            self.copy_file(str(path), str(place / path.name))


setup(
    cmdclass={"build_py": BuildWithNotebooks},
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    keywords=cfg["keywords"].split(),
    license=cfg["license"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["encoder/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()],
        "nbdev": ["sharp_distill=sharp_distill._modidx:d"],
    },
    zip_safe=False,
)
