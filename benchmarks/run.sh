#!/usr/bin/env bash
# `make bench`: this project and GPTQModel (default, and with its scale search) on the same model, calibration tokens and
# held-out texts, one after the other in one run; then ratios with paired bootstrap intervals.
#
#   VENV             this project's environment (.venv)
#   INTEROP_ENVS     where GPTQModel's environment is made and kept (.interop)
#   BENCH_MODEL      a 16-bit checkpoint (made: the demo's model)
#   BENCH_CALIB      calibration text, .txt or .jsonl (builtin)
#   BENCH_TEXTS      held-out texts, each NAME=FILE (heldout=heldout)
#   BENCH_SAMPLES    calibration windows of 512 tokens (64)
#   BENCH_BITS, BENCH_GROUP_SIZE   4, 64
#   BENCH_TOOLS      which to run ("qwenq gptqmodel gptqmodel-mse"); also qwenq-full, pulls from all windows;
#                    llmcompressor (its imatrix_mse observer), autoround (BENCH_ITERATIONS steps a layer, 200), and
#                    llamacpp-Q4_K_M. Their environments, INTEROP_ENVS/TOOL, are made of interop/requirements-TOOL.txt
#   BENCH_OUT        out/bench
# Of the calibration windows qwenq replaces every fifth by the built-in set's, unless they are that set's already: its
# default, which the other tools do not have (docs/quantize.md).
# Results: BENCH_OUT/benchmarks.jsonl gets one object a tool and text; checkpoints and logs lie beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(realpath "${VENV:-.venv}")
envs=${INTEROP_ENVS:-.interop}
out=${BENCH_OUT:-out/bench}
bits=${BENCH_BITS:-4} group=${BENCH_GROUP_SIZE:-64} samples=${BENCH_SAMPLES:-64}
tools=${BENCH_TOOLS:-qwenq gptqmodel gptqmodel-mse}
model=${BENCH_MODEL:-$out/model}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} TOKENIZERS_PARALLELISM=false
mkdir -p "$out"

if [ ! -e "$model/config.json" ]; then
    "$venv/bin/python" -c 'import sys, pathlib; from qwenq.cli.demo_model import make_demo_model; make_demo_model(pathlib.Path(sys.argv[1]))' "$model"
fi
python_of() { # tool: the Python of its environment, made if it is not there
    local name=${1%%-*}
    if [ ! -e "$envs/$name/.installed" ]; then
        "${PYTHON:-python3}" -m venv "$envs/$name"
        "$envs/$name/bin/pip" install --quiet -r "interop/requirements-$name.txt" >&2
        touch "$envs/$name/.installed"
    fi
    realpath "$envs/$name/bin/python" --no-symlinks
}

tokens() { # text out.npy windows
    [ -e "$2" ] || "$venv/bin/python" benchmarks/make_tokens.py "$model" "$1" "$2" --num-samples "$3" --sequence-length 512
}
tokens "${BENCH_CALIB:-builtin}" "$out/calibration-$samples.npy" "$samples"
texts=${BENCH_TEXTS:-heldout=heldout}
first=""
for text in $texts; do
    tokens "${text#*=}" "$out/${text%%=*}.npy" 20
    first=${first:-$out/${text%%=*}.npy}
done

for tool in $tools; do
    name=$tool-$bits-bit-g$group
    [[ $tool != llamacpp-* ]] || name=$tool
    [ ! -e "$out/$name.json" ] || continue
    rm -rf "${out:?}/$name" "$out/$name.partial"
    echo "$name" >&2
    case $tool in
    qwenq | qwenq-full)
        share=0.5
        [ "$tool" = qwenq ] || share=1
        started=$(date +%s%N)
        "$venv/bin/qwenq" quantize "$model" -o "$out/$name" --bits "$bits" --group-size "$group" \
            --error-correction-share "$share" --calibration "$out/calibration-$samples.npy" --eval-text "$first" \
            --json >"$out/$name.part" 2>"$out/$name.log"
        echo "{\"process_s\": $(( ($(date +%s%N) - started) / 10000000 ))e-2}" >"$out/$name.time"
        ;;
    gptqmodel | gptqmodel-mse)
        mse=0
        [ "$tool" = gptqmodel ] || mse=2.4
        "$(python_of "$tool")" benchmarks/gptqmodel_quantize.py "$model" "$out/$name" --tokens "$out/calibration-$samples.npy" \
            --bits "$bits" --group-size "$group" --mse "$mse" >"$out/$name.part" 2>"$out/$name.log"
        ;;
    llmcompressor)
        "$(python_of "$tool")" benchmarks/llmcompressor_quantize.py "$model" "$out/$name" \
            --tokens "$out/calibration-$samples.npy" --bits "$bits" --group-size "$group" >"$out/$name.part" 2>"$out/$name.log"
        ;;
    autoround)
        "$(python_of "$tool")" benchmarks/autoround_quantize.py "$model" "$out/$name" \
            --tokens "$out/calibration-$samples.npy" --bits "$bits" --group-size "$group" \
            --iterations "${BENCH_ITERATIONS:-200}" >"$out/$name.part" 2>"$out/$name.log"
        ;;
    llamacpp-*)
        "$(python_of "$tool")" benchmarks/llamacpp_quantize.py "$model" "$out/$name" --type "${tool#llamacpp-}" \
            >"$out/$name.part" 2>"$out/$name.log"
        ;;
    *)
        echo "unknown tool $tool: qwenq, qwenq-full, gptqmodel, gptqmodel-mse, llmcompressor, autoround or llamacpp-TYPE" >&2
        exit 2
        ;;
    esac
    mv "$out/$name.part" "$out/$name.json"
done

for text in $texts; do
    label=${text%%=*}
    # shellcheck disable=SC2086
    "$venv/bin/python" benchmarks/compare.py "$model" "$out" --text "$label" --bits "$bits" --group-size "$group" \
        --tools $tools
done
