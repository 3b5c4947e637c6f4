# Stable Diffusion's ft-EMA decoder (CompVis/latent-diffusion): L1 + LPIPS, and later a hinge loss. Smooth pictures.
l1_weight = 1.0
mse_weight = 0.0
lowres_weight = 0.0
feature_matching_weight = 0.0
encoder_feature_weight = 0.0
lpips_weight = 1.0  # pip install lpips
adversarial_form = "hinge"
adversarial_scaling = "adaptive"
adversarial_weight = 0.5
adversarial_start = 50_001
replay_size = 0
