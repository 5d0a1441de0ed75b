#!/usr/bin/env bash
# Runs the benchmarks on a CUDA machine and writes CSVs to notes/results: the update of the real-size SmolVLA (random
# weights), rollouts of 1 to 64 environments with the embedded policy and with a real-size one, and MuJoCo Warp worlds
# where they are installed.
#
#     PYTHON=.venv/bin/python benchmarks/gpu.sh [--quick]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
out=notes/results
stamp=$(date +%F)-gpu
flags=("$@")

"$python" - <<'CHECK'
import sys

try:
    import torch
except ImportError:
    sys.exit("gpu.sh: no torch in this Python: set PYTHON to the project's interpreter, e.g. PYTHON=.venv/bin/python")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA device: run it on a machine with an NVIDIA GPU, its driver, "
             "and a CUDA build of torch")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
CHECK

export HF_HUB_OFFLINE=1 MUJOCO_GL=${MUJOCO_GL:-egl}

"$python" benchmarks/update.py --size tiny --device cuda --csv "$out/$stamp-update-tiny.csv" "${flags[@]}"
"$python" benchmarks/update.py --size real --device cuda --csv "$out/$stamp-update-real.csv" "${flags[@]}"

"$python" benchmarks/rendering.py --csv "$out/$stamp-rendering.csv" "${flags[@]}"
"$python" benchmarks/rollout.py --device cuda --csv "$out/$stamp-rollout-tiny.csv" "${flags[@]}"

if "$python" -c "import mujoco_warp" 2>/dev/null; then
  "$python" benchmarks/warp_worlds.py --device cuda --csv "$out/$stamp-warp.csv" "${flags[@]}"
fi

# The real-size SmolVLA with random weights, for the two cameras of the preset.
policy=$(mktemp -d)/policy
trap 'rm -rf "$(dirname "$policy")"' EXIT
"$python" - "$policy" <<'BUILD'
import sys
from pathlib import Path

sys.path[:0] = [".", "benchmarks"]
from _real_size import write_real_smolvla

write_real_smolvla(Path(sys.argv[1]), ("camera_up", "wrist_camera"))
BUILD
"$python" benchmarks/rollout.py --device cuda --pretrained-path "$policy" --forms batched \
  --csv "$out/$stamp-rollout-real.csv" "${flags[@]}"
