# Stable Diffusion's ft-MSE decoder: like ft-EMA, but with MSE + 0.1 LPIPS. Its pictures are the smoothest.
from recipes.ft_ema import *

l1_weight = 0.0
mse_weight = 1.0
lpips_weight = 0.1
