#!/usr/bin/env bash
# Train both variants from scratch and measure them at 256, 512 and 1,024 pixels, at the same time on one GPU:
#
#   tools/measure.sh taef2_encoder.pth pictures held_out_pictures results [more flags for train.py]
#
# The teacher must be one that has both variants. The last lines it prints are the tables; the pictures are in
# results/*/samples.
set -euo pipefail
teacher=$1 pictures=$2 held_out=$3 out=$4
shift 4
mkdir -p "$out"
for variant in midblock_gn plain; do
  (
    python train.py --teacher="$teacher" --variant=$variant --data_dir="$pictures" --val_dir="$held_out" \
      --max_iters=18000 --eval_interval=6000 --eval_images=29 --out_dir="$out/$variant" "$@"
    python sample.py --out_dir="$out/$variant" --size=256,512,1024 --dtype=float32
  ) > "$out/$variant.txt" 2>&1 &
done
wait
for variant in midblock_gn plain; do
  echo "== $variant"
  grep -E "^(start|images_per_second|peak_memory_mb|seconds)|^[0-9]+ images|PSNR|teacher  |our " "$out/$variant.txt"
done
