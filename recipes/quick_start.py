# Two minutes on a CPU, no data, no downloads: the bundled donor learns the toy VAE, on bundled photographs.
init_from = "donor"
out_dir = "out-quick"
crop = 64
max_iters = 100
log_interval = 10
eval_interval = 25
