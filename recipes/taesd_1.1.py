# TAESD 1.1: adversarial + LPIPS + Fourier amplitudes + low-res MSE (taesd issues 2 and 11); the weights are ours.
from recipes.author import *

lpips_weight = 0.5  # pip install lpips
frequency_weight = 0.1
lowres_weight = 1.0
