"""Preview latents by one matrix from latents to colours, as ComfyUI keeps one for each model."""
import torch
import torch.nn.functional as F


def fit_latent_rgb(latents, images):
    """Find the matrix by least squares, from latents [N,C,h,w] and their images [N,3,H,W] in [0,1].

    Returns (factors [C,3], bias [3], R²). latents @ factors + bias is the mean colour of a patch in [-1,1]."""
    colors = F.adaptive_avg_pool2d(images * 2 - 1, latents.shape[-2:]).movedim(1, -1).flatten(0, 2).cpu().double()
    values = latents.movedim(1, -1).flatten(0, 2).cpu().double()
    values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
    solved = torch.linalg.lstsq(values, colors, driver="gelsd").solution  # the smallest one, where there are many
    r2 = 1 - (values @ solved - colors).square().sum() / (colors - colors.mean(0)).square().sum().clamp(min=1e-9)
    return solved[:-1].float(), solved[-1].float(), r2.item()


def latent_rgb(latents, factors, bias, size):
    """The preview of latents [N,C,h,w], in [0,1] and enlarged to [N,3,size,size]."""
    colors = torch.einsum("nchw,cr->nrhw", latents.cpu(), factors) + bias.view(1, 3, 1, 1)
    return F.interpolate(colors / 2 + 0.5, size).clamp(0, 1)


def as_python(factors, bias):
    """The matrix as lines of Python."""
    rows = "".join(f"    {[round(value, 4) for value in row]},\n" for row in factors.tolist())
    return f"latent_rgb_factors = [\n{rows}]\nlatent_rgb_factors_bias = {[round(b, 4) for b in bias.tolist()]}"
