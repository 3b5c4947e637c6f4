"""Every mistake that a user can make ends with one line that says what would work, and leaves nothing behind."""
import os
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from conftest import HERE, TINY, script, start
from model import Decoder, Encoder
from support.export import save_taesd
from test_smoke import trained_once

SETTINGS_FILES = {"unknown": "batch_size = 4\nstesp = 1\n", "mistyped": "batch_size = 'big'\n", "syntax": "seed =\n"}
RESUME = "train.py --init_from=resume --out_dir={run} --max_iters=62"
NO_PIXEL_LOSS = "train.py --mse_weight=0 --lowres_weight=0"
TOY = "{here}/assets/toy_vae"
MISTAKES = [  # (command, what the line must say)
    # flags
    ("train.py --lerning_rate=1", "did you mean learning_rate"),
    ("train.py batch_size=8", "written --name=value"),
    ("train.py --batch_size=big", "--batch_size=big: must be a whole number, for example 16"),
    ("train.py --learning_rate=nan", "0 or more"),
    ("train.py --train_encoder=maybe", "true or false"),
    # files of settings
    ("train.py gone.py", "gone.py: no such file of settings"),
    ("train.py {folder}/unknown.py", "unknown.py: stesp: did you mean"),
    ("train.py {folder}/mistyped.py", "mistyped.py: batch_size = 'big': must be a whole number"),
    ("train.py {folder}/syntax.py", "syntax.py: cannot be read as a file of settings (SyntaxError"),
    # values
    ("train.py --batch_size=0", "--batch_size=0: must be more than 0"),
    ("train.py --max_iters=0", "--init_from=donor for example"),
    ("train.py --replay_size=3", "at least the batch size, 4"),
    ("train.py --variant=f32 --teacher={folder}/kl", "--variant=f32"),
    ("train.py --device=tpu9", "--device=tpu9: cannot be used here"),
    ("train.py --crop=50", "16 or more and a multiple of 8"),
    # values that do not fit together
    ("train.py --train_encoder=false --train_decoder=false", "nothing is left to train"),
    ("train.py --encoder_adversarial_weight=1 --train_encoder=false", "needs train_encoder"),
    ("train.py {here}/recipes/taesd_1.2.py --latent_noise=1", "latent_noise=0"),
    (NO_PIXEL_LOSS + " --adversarial_weight=0", "the decoder has no loss"),
    (NO_PIXEL_LOSS + " --adversarial_start=1", "until then"),
    (NO_PIXEL_LOSS + " --adversarial_scaling=adaptive", "needs a pixel loss"),
    # images
    ("train.py --data_dir=nowhere", "nowhere: no such folder of images"),
    ("train.py --data_dir={folder}/empty", "holds no .jpg"),
    ("train.py --data_dir={folder}/one", "at least two images"),
    ("train.py --data_dir={folder}/texts", "held-out images can be used"),
    ("train.py --data_dir={folder}/texts --val_dir={pictures}", "more than half"),
    # teachers
    ("train.py --teacher=sdlx", "did you mean sdxl"),
    ("train.py --teacher=stranger/vae", "a local diffusers folder will do"),
    ("train.py --teacher={folder}/oobleck", "AutoencoderOobleck"),
    ("train.py --teacher={folder}/empty", "no config.json"),
    ("train.py --teacher=gone_encoder.pth", "no such file"),
    ("train.py --teacher={folder}/hostile/vae.ckpt::" + TOY, "vae.ckpt"),
    ("train.py --teacher={folder}/half.safetensors::" + TOY, "half.safetensors"),
    ("train.py --teacher={folder}/kl/diffusion_pytorch_model.safetensors", "add ::sd, ::sdxl, ::sd3 or ::flux1"),
    ("train.py --teacher={folder}/lone_encoder.pth", "its other half is missing"),
    ("train.py --teacher={folder}/grey", "AutoencoderKL cannot encode and decode an RGB image, [1, 3, 128, 128]"),
    ("train.py --teacher={folder}/rgba", "to have 4 channels, but got 3 channels instead"),
    ("train.py --teacher={folder}/upscaling", "to [1, 12, 128, 128]; a teacher must return what it encodes"),
    # weights to start from
    ("train.py --init_from=toy", "a run's out_dir"),
    ("train.py --init_from={folder}/half.pth", "half.pth: not a readable weights file"),
    ("train.py --init_from=" + TOY + "/diffusion_pytorch_model.safetensors", "a VAE of full size is a --teacher="),
    ("train.py --init_from={folder}/kl", "a VAE of full size is a --teacher="),
    ("train.py --init_from={folder}/others.pth", "not an encoder or decoder in taesd.py's layout"),
    ("train.py --init_from={folder}/others", "not a checkpoint of this version"),
    ("train.py --init_from={folder}/hostile", "ckpt.pt"),
    ("train.py --init_from={folder}/mixed/taesd_encoder.pth", "encoder and decoder differ"),
    ("train.py --init_from={folder}/foreign.pth", "does not know the teacher's latents"),
    ("train.py --init_from={run} --width=16", "add --width=8"),
    # runs
    ("train.py --out_dir={run}", "--init_from=resume goes on with it"),
    ("train.py --out_dir={pictures}/0.jpg", "0.jpg"),
    ("train.py --init_from=resume", "settings.py: no such file"),
    (RESUME + " --max_iters=60", "has done 60 steps; raise --max_iters"),
    (RESUME + " --width=16", "{run}/settings.py --init_from={run} --out_dir="),
    (RESUME + " --teacher={folder}/kl", "the encoder of {run} does not fit"),
    (RESUME + " --optimizer=adam", "the student_optimizer of {run} does not fit"),
    # looking at a run or a teacher
    ("sample.py --out_dir={folder}/empty", "there is no run here yet"),
    ("sample.py --out_dir={run} --export_dtype=int8", "float32 or float16"),
    ("sample.py --out_dir={run} --images={folder}/texts", "can be used"),
    ("sample.py --out_dir={run} --compare={folder}/gone.pth", "--compare={folder}/gone.pth: no such weights"),
    ("sample.py --out_dir={run} --compare={folder}/foreign.pth", "has 6 channels at factor 8, the teacher 4"),
    ("sample.py --teacher=toy --size=50", "multiple of 8"),
    ("sample.py --teacher=toy --size=big", "or 0 for whole pictures"),
    ("sample.py --teacher=toy --export", "exports a run"),
    ("sample.py --curves=gone", "not a readable log")]


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hacked",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What stands in braces in the commands: a folder of bad files, a run, a folder of pictures, and the repository."""
    folder, tiny = tmp_path_factory.mktemp("places"), trained_once()
    for name in ("empty", "hostile", "texts", "one", "oobleck", "others", "mixed"):
        (folder / name).mkdir()
    for name, text in SETTINGS_FILES.items():
        (folder / f"{name}.py").write_text(text)
    for i in range(4):
        (folder / "texts" / f"{i}.jpg").write_text("not an image")
    Image.new("RGB", (64, 64)).save(folder / "one" / "0.png")
    torch.save({"settings": Hostile()}, folder / "hostile" / "ckpt.pt")
    torch.save({"state_dict": Hostile()}, folder / "hostile" / "vae.ckpt")
    torch.save({"weights": torch.ones(1)}, folder / "others" / "ckpt.pt")
    torch.save({"weights": torch.ones(1)}, folder / "others.pth")
    (folder / "oobleck" / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    (folder / "half.safetensors").write_bytes(b"x" * 1000)
    (folder / "half.pth").write_bytes((tiny.out / "taesd_encoder.pth").read_bytes()[:5000])
    save_taesd(str(folder / "lone_encoder.pth"), Encoder(width=8))
    save_taesd(str(folder / "foreign.pth"), Decoder(6, 8, 8))
    save_taesd(str(folder / "mixed" / "taesd_encoder.pth"), Encoder(width=8))
    save_taesd(str(folder / "mixed" / "taesd_decoder.pth"), Decoder(width=16))
    for name, ins, outs in (("kl", 3, 3), ("grey", 1, 1), ("rgba", 4, 4), ("upscaling", 3, 12)):
        AutoencoderKL(ins, outs, block_out_channels=(32,) * 3, down_block_types=("DownEncoderBlock2D",) * 3,
                      up_block_types=("UpDecoderBlock2D",) * 3).save_pretrained(folder / name)
    shutil.copytree(tiny.out, folder / "run")
    shutil.copytree(tiny.folder, folder / "pictures")
    return {"folder": folder, "run": folder / "run", "pictures": folder / "pictures", "here": HERE}


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_is_one_clear_line(command, words, places, tmp_path, monkeypatch, capfd):
    def files():
        return {path: path.stat().st_mtime_ns for path in places["folder"].rglob("*")}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # a closed port of this machine
    name, *arguments = command.format(**places).split()
    tiny = [*TINY, "--max_iters=2"] if name == "train.py" else ["--device=cpu"]
    before = files()
    with pytest.raises(SystemExit) as ended:
        script(name, *tiny, f"--out_dir={tmp_path / 'out'}", *arguments)
    line = ended.value.code
    assert line.startswith("error: ") and "\n" not in line and len(line) < 700
    assert words.format(**places) in line
    assert "hacked" not in "".join(capfd.readouterr())  # no code in a stranger's file was run
    assert files() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, words", [
    ("--crop=50", "error: --crop=50: must be 16 or more and a multiple of 8 for this teacher\n"),
    ("--replay_size=1e12", "error: out of memory: a smaller --batch_size (4)")])
def test_a_mistake_in_a_process_of_its_own(flag, words, tmp_path):
    process = start("train.py", *TINY, flag, f"--out_dir={tmp_path / 'out'}", PYTHONWARNINGS="ignore")
    output, errors = process.communicate()
    assert process.returncode == 1 and "start  " not in output
    assert errors.startswith(words) and errors.count("\n") == 1
