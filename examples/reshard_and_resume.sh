#!/usr/bin/env bash
# One training run through three layouts: its loss curve goes on as if nothing had happened.
#
#   examples/reshard_and_resume.sh [FOLDER]
#
# Trains a small mixture-of-experts GPT on this machine's CPU with EP=2, reshards its checkpoint
# offline to TP=2·PP=2 (and Megatron's legacy file format), trains on, reshards to EP=2·DP=2 in
# torch_dist, trains on. Beside it a run that never changed its layout; the last table compares the
# losses of both. Needs about 4 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
out=${1:-runs/reshard_and_resume}
rm -rf "$out"
mkdir -p "$out"
export OMP_NUM_THREADS=1

model=(
    --num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
    --num-experts 4 --moe-ffn-hidden-size 128 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall --swiglu --disable-bias-linear
    --position-embedding-type rope --normalization RMSNorm --untie-embeddings-and-output-weights
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
    --hidden-dropout 0 --attention-dropout 0 --lr 2e-3 --lr-decay-style constant --adam-eps 1e-6
    --tokenizer-type NullTokenizer --vocab-size 127 --mock-data --seed 1
    --make-vocab-size-divisible-by 64  # the same padding with TP 1 and 2: the softmax sees it
    --use-distributed-optimizer --eval-iters 0 --eval-interval 1000 --log-interval 1
    --train-iters 30 --exit-on-missing-checkpoint
)

# train NAME PROCESSES LAST-ITERATION FLAGS...
train() {
    local name=$1 processes=$2 last=$3
    shift 3
    echo "train $name: to iteration $last with $*"
    "$bin/megatron-moe" run --device cpu -n "$processes" examples/pretrain_gpt.py \
        "${model[@]}" --exit-interval "$last" "$@" >"$out/$name.log" 2>&1 ||
        { tail -20 "$out/$name.log"; exit 1; }
}

ep2=(--expert-model-parallel-size 2 --expert-tensor-parallel-size 1)
tp2pp2=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel
    --expert-tensor-parallel-size 1)

train first 2 10 "${ep2[@]}" --ckpt-format torch_dist --save "$out/first" --save-interval 10
train unchanged 2 30 "${ep2[@]}" --ckpt-format torch_dist --load "$out/first"

"$bin/megatron-moe" reshard "$out/first" "$out/second" \
    --tp 2 --pp 2 --ep 1 --etp 1 --dp 1 --format torch
train second 4 20 "${tp2pp2[@]}" --ckpt-format torch --load "$out/second" \
    --save "$out/third" --save-interval 10

"$bin/megatron-moe" reshard "$out/third" "$out/fourth" \
    --tp 1 --pp 1 --ep 2 --etp 1 --dp 2 --format torch_dist
train fourth 2 30 "${ep2[@]}" --ckpt-format torch_dist --load "$out/fourth"

"$bin/megatron-moe" verify "$out/third" "$out/fourth"
"$bin/python" - "$out" <<'PYTHON'
import re, sys
from pathlib import Path

def losses(name):
    text = (Path(sys.argv[1]) / f"{name}.log").read_text()
    found = re.findall(r"iteration\s+(\d+)/.*?lm loss: ([\d.E+-]+)", text)
    found = {int(iteration): float(loss) for iteration, loss in found}
    # Megatron logs a run's first iteration alone, then once more in the mean with the second.
    first, second = sorted(found)[:2]
    found[second] = 2 * found[second] - found[first]
    return found

kept, changed = losses("first") | losses("unchanged"), {}
where = {}
for name, layout in (("first", "EP2"), ("second", "TP2·PP2"), ("fourth", "EP2, again")):
    for iteration, loss in losses(name).items():
        changed[iteration], where[iteration] = loss, layout
print(f"{'iteration':>9}  {'layout':<11} {'loss':>9}  {'unchanged':>9}  difference")
for iteration in sorted(changed):
    one, other = changed[iteration], kept[iteration]
    print(f"{iteration:>9}  {where[iteration]:<11} {one:>9.5f}  {other:>9.5f}  {one - other:+.1e}")
worst = max(abs(changed[i] - kept[i]) for i in changed)
print(f"{len(changed)} iterations through three layouts, at most {worst:.1e} from the unchanged run")
sys.exit(len(changed) != 30 or worst > 1e-4)
PYTHON
