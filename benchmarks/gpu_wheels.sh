#!/bin/sh
# Downloads the wheels that a machine without network lacks for benchmarks/gpu_session.py, when it has Python 3.12,
# x86-64, torch, transformers and accelerate: benchmarks/gpu_wheels.sh DIR
set -eu

most_mib=60
python=${PYTHON:-python3}
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
folder=$1
constraints=$(dirname "$0")/../constraints.txt
mkdir -p "$folder"
if ls "$folder"/*.whl > /dev/null 2>&1; then
  echo "error: $folder has wheels already: name an empty folder" >&2
  exit 2
fi

# What liger-kernel and deepspeed need beyond torch and transformers, and what this project's reports need.
"$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: -c "$constraints" -d "$folder" \
  --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
  liger-kernel hjson msgpack pydantic pydantic-core annotated-types typing-inspection typing-extensions py-cpuinfo \
  ninja einops psutil rich markdown-it-py mdurl pygments
# DeepSpeed comes as source: without operators, which are compiled when they are used, its wheel is for any machine.
DS_BUILD_OPS=0 "$python" -m pip wheel -qq --disable-pip-version-check --no-deps -c "$constraints" -w "$folder" deepspeed
ls "$folder"/deepspeed-*-none-any.whl > /dev/null || { echo "error: deepspeed's wheel is for this machine only" >&2; exit 1; }

bytes=$(cat "$folder"/*.whl | wc -c)
mib=$(((bytes + 1048575) / 1048576))
if [ "$mib" -gt "$most_mib" ]; then
  echo "error: the wheels take $mib MiB; allowed: $most_mib" >&2
  exit 1
fi
echo "$mib MiB in $folder. On the other machine: pip install --no-index --no-deps $folder/*.whl"
