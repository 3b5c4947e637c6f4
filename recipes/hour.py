# An hour of one CPU core, the longest run in RESULTS.md. Give --data_dir and --val_dir.
teacher = "taef2_encoder.pth"  # and taef2_decoder.pth beside it, from github.com/madebyollin/taesd
variant = "plain"
out_dir = "out-hour"
crop = 64
max_iters = 6500
eval_interval = 340
eval_images = 29
