# A minute or two on a CPU, no data, no downloads: a half-width student of the toy VAE, on bundled photographs.
out_dir = "out-quick"
crop = 64
width = 32
adversarial_weight = 0.0  # too short a run for it
max_iters = 300
eval_interval = 100
