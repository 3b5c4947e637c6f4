# The track of RESULTS.md, an hour and a quarter of one CPU core; --crop=64 --max_iters=3000 is 25 minutes. Give
# --data_dir and --val_dir. On a GPU leave the batch and the rate at the trainer's own.
teacher = "taef2_encoder.pth"  # and taef2_decoder.pth beside it, from github.com/madebyollin/taesd
variant = "plain"
out_dir = "out-hour"
batch_size = 4  # of so few images small steps, and many, make most; on a GPU they would leave it idle
learning_rate = 5e-4
max_iters = 4000
eval_interval = 400
eval_images = 29
