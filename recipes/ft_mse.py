# Stable Diffusion's ft-MSE decoder: as ft-EMA, but MSE + 0.1 LPIPS. The smoothest of all.
from recipes.ft_ema import *

l1_weight = 0.0
mse_weight = 1.0
lpips_weight = 0.1
