# An hour of one CPU core, the longest run in RESULTS.md. Give --data_dir and --val_dir.
teacher = "taef2_encoder.pth"  # and taef2_decoder.pth beside it, from github.com/madebyollin/taesd
variant = "plain"
out_dir = "out-hour"
crop = 64
batch_size = 4  # of so few images small steps, and many, make most; on a GPU they would leave it idle
learning_rate = 5e-4
max_iters = 9000
eval_interval = 600
eval_images = 29
