"""Losses that only the published recipes in this folder use. fake, real: images [N,3,H,W] in [0,1]."""
import functools

import torch
import torch.nn.functional as F

from support.config import fail


def hinge_discriminator_loss(real_scores, fake_scores):
    """D's loss in CompVis/latent-diffusion, in which only scores between -1 and 1 count."""
    return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()


def hinge_adversarial_loss(real_scores, fake_scores):
    """The decoder's loss there. It is not relativistic: the scores of the real images do not matter."""
    return -fake_scores.mean()


def frequency_l1(fake, real):
    """L1 of the amplitudes of the 2-D Fourier transform: how much of each frequency there is, regardless of where."""
    return F.l1_loss(torch.fft.rfft2(fake, norm="ortho").abs(), torch.fft.rfft2(real, norm="ortho").abs())


@functools.cache
def load_lpips(device):
    try:
        from lpips import LPIPS
        return LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except Exception as error:  # the package is not installed, or its VGG weights cannot be downloaded
        fail(f"--lpips_weight: needs the lpips package and its VGG weights ({error}); pip install lpips, or "
             f"--lpips_weight=0")


def lpips(fake, real):
    """The perceptual distance of the `lpips` package (Zhang et al. 2018)."""
    return load_lpips(fake.device)(fake * 2 - 1, real * 2 - 1).mean()


# These replace the adversarial loss by one with a gradient of another size. They take the adversarial loss, the fakes,
# the sum of the losses so far, the decoder, and the GradScaler.

def unit_gradient(adversarial, fake, total, decoder, scaler):
    """A loss whose gradient on the fakes has a standard deviation of 1 / fake.numel() over the batch, so that it can
    neither vanish nor explode (seraena)."""
    gradient = torch.autograd.grad(scaler.scale(adversarial), fake, retain_graph=True)[0]
    return (fake * gradient / (gradient.std() + 1e-12)).mean()


def adaptive(adversarial, fake, total, decoder, scaler):
    """The adversarial loss times the weight that makes its gradient at the decoder's last layer as large as that of the
    pixel losses (VQGAN, CompVis/latent-diffusion). The encoder's losses have no gradient there."""
    pixel_norm, adversarial_norm = (
        torch.autograd.grad(scaler.scale(loss), decoder[-1].weight, retain_graph=True)[0].norm()
        for loss in (total, adversarial))
    epsilon = scaler.scale(torch.full_like(pixel_norm, 1e-4))
    return adversarial * (pixel_norm / (adversarial_norm + epsilon)).clamp(0, 1e4).detach()


SCALINGS = {"none": lambda adversarial, *others: adversarial, "unit": unit_gradient, "adaptive": adaptive}
