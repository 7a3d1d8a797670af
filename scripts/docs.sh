#!/usr/bin/env bash
# Builds the site into build/site: every tutorial is run, every warning is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv/bin/sphinx-build ]; then
  python3 -m venv .venv && .venv/bin/pip install --quiet -c constraints.txt -e ".[docs]"
fi
.venv/bin/python -m sphinx -q -W --keep-going -c docs . build/site
echo "build/site/index.html"
