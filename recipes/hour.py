# 35 minutes to an hour on one CPU core. Add --data_dir and --val_dir.
teacher = "taef2_encoder.pth"  # with taef2_decoder.pth beside it, from github.com/madebyollin/taesd
variant = "plain"
finish = 0.06  # one crop of 256 pixels takes as long as two of these steps
batch_size = 4  # with so few images, many small steps learn the most; a GPU would be idle with them
learning_rate = 5e-4
max_iters = 4000
eval_interval = 400
eval_images = 29
