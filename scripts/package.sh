#!/usr/bin/env bash
# Builds wheel and sdist, checks what PyPI would check, and tries both as a user gets them:
#   scripts/package.sh            # the wheel: the command, a quickstart of two batches; the sdist: some of its own tests
#   scripts/package.sh --tests    # the sdist: all of its tests (minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet -c constraints.txt build twine
"$work/tools/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" || { tail -n 30 "$work/build.log"; exit 1; }
"$work/tools/bin/twine" check --strict "$work"/dist/*

echo "== the wheel, as a user gets it"
python3 -m venv "$work/user"
"$work/user/bin/pip" install --quiet -c constraints.txt "$(ls "$work"/dist/*.whl)[text]"
mkdir "$work/elsewhere" && cd "$work/elsewhere"
"$work/user/bin/dropreg" --version
"$work/user/bin/dropreg" init
"$work/user/bin/dropreg" fit --config quickstart.yaml --trainer.max_epochs=1 --trainer.limit_train_batches=2 \
  --trainer.limit_val_batches=2 --trainer.enable_progress_bar=false

echo "== the sdist, with the tests that it contains"
tar -xzf "$work"/dist/*.tar.gz -C "$work" && cd "$work"/lightning_dropreg-*/
python3 -m venv .venv && .venv/bin/pip install --quiet -c constraints.txt -e ".[test]"
if [ "${1:-}" = --tests ]; then .venv/bin/pytest; else .venv/bin/pytest tests/losses tests/test_imports.py; fi
cd "$root" && mkdir -p dist && cp "$work"/dist/* dist/
ls -l dist
