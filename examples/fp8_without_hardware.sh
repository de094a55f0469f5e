#!/usr/bin/env bash
# Does FP8 hurt my model? Answered on a CPU, by a loss curve.
#
#   examples/fp8_without_hardware.sh [FOLDER] [RECIPE...]
#
# Trains the demo's mixture of experts in bf16, then again with every expert GEMM rounded as the
# given recipes of Transformer Engine round it (tensorwise, delayed, blockwise, mxfp8; blockwise
# when none is given), and compares the validation losses. Fails when one is more than 2 % off.
# ITERATIONS=100 makes it shorter. Needs 3 to 6 minutes a run on 2 cores: what FP8 does to the
# numbers is seen here, its speed is not.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
out=${1:-runs/fp8_without_hardware}
shift || true
recipes=("${@:-blockwise}")
iterations=${ITERATIONS:-420}
mkdir -p "$out"
export OMP_NUM_THREADS=1

"$bin/megatron-moe" data --out "$out/data/text" --vocab-size 1024 --limit-mb 5 --progress plain \
    --force >"$out/data.log" 2>&1 || { tail -20 "$out/data.log"; exit 1; }
# The command's last line is Megatron's flags for what it made.
read -ra data <<<"$(tail -1 "$out/data.log")"
model=(
    --num-layers 3 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
    --num-experts 8 --moe-router-topk 2 --moe-router-topk-scaling-factor 2
    --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32 --moe-grouped-gemm
    --disable-bias-linear --init-method-std 0.06 --attention-dropout 0 --hidden-dropout 0
    --seq-length 128 --max-position-embeddings 128 --micro-batch-size 8 --global-batch-size 16
    --bf16 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters $((iterations / 10))
    --train-iters "$iterations" --weight-decay 0.1 --clip-grad 1 --seed 1234
    --eval-interval "$iterations" --eval-iters 8 --log-interval 10 --num-workers 0
    --expert-model-parallel-size 2 --use-distributed-optimizer
)

# train NAME FLAGS...
train() {
    local name=$1
    shift
    echo "train $name: $iterations iterations ${*}"
    "$bin/megatron-moe" run --device cpu -n 2 examples/pretrain_gpt.py \
        "${data[@]}" "${model[@]}" "$@" >"$out/$name.log" 2>&1 ||
        { tail -20 "$out/$name.log"; exit 1; }
}

train bf16
for recipe in "${recipes[@]}"; do
    train "$recipe" --moe-fp8-emulate "$recipe"
done

"$bin/python" - "$out" "${recipes[@]}" <<'PYTHON'
import re, sys
from pathlib import Path

def validation_loss(name):
    text = (Path(sys.argv[1]) / f"{name}.log").read_text()
    found = re.findall(r"validation loss at iteration \d+ .*?lm loss value: ([\d.E+-]+)", text)
    return float(found[-1])

bf16 = validation_loss("bf16")
print(f"{'experts in':<24} {'validation loss':>15}  against bf16")
print(f"{'bf16':<24} {bf16:>15.4f}")
worst = 0.0
for recipe in sys.argv[2:]:
    loss = validation_loss(recipe)
    off = 100 * (loss / bf16 - 1)
    worst = max(worst, abs(off))
    print(f"{'FP8 ' + recipe + ', emulated':<24} {loss:>15.4f}  {off:+.2f} %")
sys.exit(worst > 2)
PYTHON
