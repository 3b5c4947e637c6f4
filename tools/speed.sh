#!/usr/bin/env bash
# Measure how well train.py uses a GPU, and which quality it reaches in how many seconds:
#
#   tools/speed.sh taef2_encoder.pth pictures held_out_pictures results
#
# It prints images per second at several batch sizes, where the time of a step goes, and the quality that different
# batch sizes reach with the same number of images. The reports of all runs stay in the folder `results`. These
# variables make it smaller, for a trial on a CPU: BATCHES, PROFILED, QUALITY_BATCHES, IMAGES, EXTRA (flags of train.py).
set -uo pipefail
teacher=$1 pictures=$2 held_out=$3 out=$4
mkdir -p "$out"
bench() {  # name of the report, then flags
  python -m tools.bench --data_dir="$pictures" --pairs=1 --extra="${EXTRA:-}" "${@:2}" > "$out/$1.txt" 2>&1 ||
    echo "$1 failed: $(tail -n 1 "$out/$1.txt")"
}
bench sdxl-16 --batch_size=16
for batch in ${BATCHES:-16 64 256}; do
  bench "compiled-$batch" --teacher="$teacher" --batch_size="$batch"
done
for batch in ${PROFILED:-16 128}; do  # TORCHDYNAMO_DISABLE=1: not compiled, but still recorded as a CUDA graph
  bench "profile-compiled-$batch" --teacher="$teacher" --batch_size="$batch" --profile
  TORCHDYNAMO_DISABLE=1 bench "profile-recorded-$batch" --teacher="$teacher" --batch_size="$batch" --profile
done
for batch in ${QUALITY_BATCHES:-16 32 64 128}; do
  # the same images for all; the learning rate grows with the square root of the batch
  rate=$(python -c "print(1e-3 * ($batch / 16) ** 0.5)")
  steps=$((${IMAGES:-48000} / batch))
  python train.py --teacher="$teacher" --data_dir="$pictures" --val_dir="$held_out" --eval_size=256 --eval_images=29 \
    --batch_size="$batch" --learning_rate="$rate" --max_iters=$steps --eval_interval=$((steps / 3)) \
    --out_dir="$out/quality-$batch" ${EXTRA:-} > "$out/quality-$batch.txt" 2>&1 ||
    echo "quality-$batch failed: $(tail -n 1 "$out/quality-$batch.txt")"
done
cd "$out"
echo "== images per second, and the lower bound of a step"
grep -E "^median|^a step|G operations" sdxl-16.txt compiled-*.txt
echo "== where the time of a training step goes"
grep -E "^a training step|%$" profile-*.txt
echo "== the same images at several batch sizes, learning rate 1e-3 times the square root of batch / 16"
grep -E "^(images_per_second|seconds|val_psnr|val_ssim|val_sharpness):" quality-*.txt
