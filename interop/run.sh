#!/usr/bin/env bash
# `make interop`: quantize the small test model in every scheme that GPTQModel reads, then let GPTQModel, and
# transformers through it, load each and compare logits with this project's own dequantization.
#
#   VENV            this project's environment (.venv)
#   INTEROP_ENVS    where the other tools' environments are made and kept (.interop)
#   AUTOGPTQ_PYTHON set to a Python 3.9 to 3.11 to try the real AutoGPTQ 0.7.1 as well
#   VLLM            set to 1 to try vLLM's CPU build as well, on compressed-tensors too
# Results go to reports/interop.jsonl, one JSON object a check.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
envs=${INTEROP_ENVS:-.interop}
out=out/interop
results=reports/interop.jsonl
model=tests/data/tiny-qwen2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

make_env() { # name python
    if [ ! -e "$envs/$1/.installed" ]; then
        "$2" -m venv "$envs/$1"
        "$envs/$1/bin/pip" install --quiet -r "interop/requirements-$1.txt"
        touch "$envs/$1/.installed"
    fi
}

failed=0
check() { # label command...
    local label=$1
    shift
    if line=$("$@" 2>"$out/$label.log"); then
        echo "$label: equal"
    else
        echo "$label: FAILED, see $out/$label.log"
        failed=1
    fi
    "$venv/bin/python" -c 'import json, sys; print(json.dumps({"check": sys.argv[1]} | json.loads(sys.argv[2] or "{}")))' \
        "$label" "$line" >>"$results.new"
}

rm -rf "$out" "$results.new"
mkdir -p "$out"
make_env gptqmodel "${PYTHON:-python3}"
[ -z "${AUTOGPTQ_PYTHON:-}" ] || make_env autogptq "$AUTOGPTQ_PYTHON"
if [ -n "${VLLM:-}" ]; then
    make_env vllm "${PYTHON:-python3}"
    "$envs/vllm/bin/pip" uninstall --quiet -y torchvision torchaudio torchcodec 2>/dev/null # see the requirements
fi

make_checkpoint() { # name quantize-options...
    local name=$1
    shift
    "$venv/bin/qwenq" quantize "$model" -o "$out/$name" --sequence-length 256 --calibration tests/data/calib.txt \
        --eval-text tests/data/heldout.txt --json "$@" >"$out/$name.json" 2>"$out/$name.log"
    "$venv/bin/python" interop/reference_logits.py "$out/$name" "$out/$name.npz"
}

gptqmodel() { # name [check options]
    local name=$1
    shift
    "$envs/gptqmodel/bin/python" interop/check_gptqmodel.py "$out/$name" --logits "$out/$name.npz" "$@"
}

for scheme in 4:128 4:64 4:32 4:-1 8:128 8:64 8:32 8:-1; do
    bits=${scheme%:*} group=${scheme#*:} name=${scheme/:/-bit-g}
    make_checkpoint "$name" --bits "$bits" --group-size "$group"
    check "gptqmodel-$name" gptqmodel "$name"
    if [ "$scheme" = 4:64 ] || [ "$scheme" = 8:64 ]; then
        check "transformers-$name" gptqmodel "$name" --loader transformers
        [ -z "${AUTOGPTQ_PYTHON:-}" ] || check "autogptq-$name" "$envs/autogptq/bin/python" interop/check_autogptq.py \
            "$out/$name" --logits "$out/$name.npz"
    fi
done
make_checkpoint asymmetric-g64 --asymmetric --group-size 64
check gptqmodel-asymmetric-g64 gptqmodel asymmetric-g64
make_checkpoint mixed --bpw 5
check gptqmodel-mixed gptqmodel mixed
make_checkpoint mixed-padded --bpw 5 --pad-for-tp 2 # FFN 384 to 512
check gptqmodel-mixed-padded gptqmodel mixed-padded
make_checkpoint awq-g64 --format awq --group-size 64
check gptqmodel-awq-g64 gptqmodel awq-g64
check transformers-awq-g64 gptqmodel awq-g64 --loader transformers
"$venv/bin/qwenq" convert "$out/awq-g64" "$out/awq-g64-as-gptq" --format gptq
cp "$out/awq-g64.npz" "$out/awq-g64-as-gptq.npz"
check gptqmodel-awq-g64-as-gptq gptqmodel awq-g64-as-gptq
if [ -n "${VLLM:-}" ]; then
    vllm() { # directory name [check options]
        local directory=$1 name=$2
        shift 2
        "$envs/vllm/bin/python" interop/check_vllm.py "$directory" --logits "$out/$name.npz" "$@"
    }
    "$venv/bin/python" interop/reference_logits.py "$model" "$out/16-bit.npz"
    for dtype in float32 float16 bfloat16; do
        check "vllm-16-bit-$dtype" vllm "$model" 16-bit --dtype "$dtype"
    done
    make_checkpoint ct-g64 --format compressed-tensors --group-size 64
    make_checkpoint ct-mixed --format compressed-tensors --bpw 5
    for name in 4-bit-g128 4-bit-g64 4-bit-g32 4-bit-g-1 awq-g64 ct-g64; do
        check "vllm-$name" vllm "$out/$name" "$name"
    done
    for name in 8-bit-g64 8-bit-g-1 mixed mixed-padded ct-mixed; do # vLLM has no 8-bit kernel for CPUs
        check "vllm-$name" vllm "$out/$name" "$name" --plain-kernel
    done
fi
mv "$results.new" "$results"
exit $failed
