# Two minutes on a CPU, without data or downloads: the bundled donor is adapted to the bundled VAE and photographs.
init_from = "donor"
out_dir = "out-quick"
compile = "false"  # on a GPU, compiling would take longer than these steps
crop = 64
finish = 0.0  # larger crops at the end, which would take as long as all other steps
max_iters = 100
log_interval = 10
eval_interval = 25
