#!/bin/sh
# Builds the source distribution, and the wheel from it as pip does; checks what they hold and what PyPI would show;
# installs the wheel alone into a fresh environment that reads the first one's packages, imports every module of it
# outside the repository, and type-checks a user's script against it. No second torch is installed.
set -eu
root=$(pwd)
py=${PY:-.venv/bin/python}
case $py in /*) ;; *) py=$root/$py ;; esac
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$py" -m build --outdir "$dir/dist" . > "$dir/build.log" 2>&1 || { cat "$dir/build.log"; exit 1; }
"$py" -m twine check --strict "$dir"/dist/*
"$py" tests/support/distributions.py "$dir/dist"
"$py" -m venv --without-pip "$dir/env"
packages=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
site=$("$dir/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$py" -m pip install --quiet --no-deps --target "$site" "$dir"/dist/*.whl
# After the environment's own packages; without the first one's editable install of this project.
echo "$packages" > "$site/zz_first_environment.pth"
cd "$dir"
"$dir/env/bin/python" - "$root" <<'PYTHON'
import importlib, pathlib, pkgutil, sys
from importlib import metadata
root = pathlib.Path(sys.argv[1]).resolve()
import ssd_addon, torch
from ssd_addon import Embeddings, JointEntropyLoss, StructuredViews, StyleHeads, ViewPlan
from ssd_addon.kernels import negative_lse
for module in (ssd_addon, sys.modules["ssd_addon.kernels"]):
    where = pathlib.Path(module.__file__).resolve()
    assert root not in where.parents, f"imported from the repository: {where}"
names = {f.parts[0] for f in metadata.distribution("ssd-addon").files if f.parts[0] != ".." and not f.parts[0].endswith(".dist-info")}
assert names == {"ssd_addon"}, f"the wheel should own one top-level name: got {sorted(names)}"
sources = {p.relative_to(root / "ssd_addon").with_suffix("") for p in (root / "ssd_addon").glob("**/*.py")}
sources |= {pathlib.Path("kernels") / p.stem for p in (root / "kernels").glob("*.py")}
modules = {m.name for m in pkgutil.walk_packages(ssd_addon.__path__, "ssd_addon.")} - {"ssd_addon.__main__"}
for module in modules:
    importlib.import_module(module)
missing = {"ssd_addon." + ".".join(p.parts) for p in sources if p.name not in ("__init__", "__main__")} - modules
assert not missing, f"the wheel should hold every module: it lacks {sorted(missing)}"
assert pathlib.Path(ssd_addon.__file__).with_name("py.typed").is_file(), "the wheel should say that it is typed"
from importlib import resources
assert resources.files("ssd_addon.report").joinpath("page.js").is_file(), "the wheel should hold the report's page"
loss = JointEntropyLoss()({"content": torch.randn(2, 4, 3)})
print(f"wheel {ssd_addon.__version__}: imported outside the repository, loss {loss:.3f}")
PYTHON
sh "$root/tests/typing.sh" "$dir/env/bin/python" "$py"
