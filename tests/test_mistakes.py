"""Everything that a user may get wrong ends with one line that says what would do, and leaves nothing behind."""
import os
import shutil
import types

import huggingface_hub
import pytest
import torch
from PIL import Image

from conftest import HERE, load, script
from model import Encoder
from support import export
from support import run as support_run
from test_smoke import TINY, records, start, train, trained_once
from test_teacher import kl


@pytest.mark.parametrize("wrong,words", [
    (dict(batch_size=0), "more than 0"), (dict(encoder_loss="l3"), "mse or l1"), (dict(seed=2**32), "less than"),
    (dict(variant="big"), "plain, midblock_gn or f32"),
    (dict(train_encoder=False, train_decoder=False), "nothing is left"),
    (dict(adversarial_scaling="unity"), "none, unit or adaptive"), (dict(adversarial_form="bce"), "squares or hinge"),
    (dict(replay_size=3), "at least the batch size, 4"), (dict(optimizer="sgd"), "muon, adam or adamw"),
    (dict(echo=0.5), "1 or more"),
    (dict(encoder_adversarial_weight=1.0, latent_noise=1.0), "latent_noise=0"), (dict(profile=9, max_iters=9), "raise"),
    (dict(encoder_adversarial_weight=1.0, train_encoder=False), "needs train_encoder"),
    (dict(max_iters=0), "more than 0"), (dict(workers=0), "more than 0"), (dict(width=0), "more than 0"),
    (dict(cooldown=1.5), "between 0 and 1"), (dict(color_augment=1.5), "between 0 and 1")])
def test_a_wrong_setting_is_one_clear_line(tiny_run, wrong, words):
    settings = records(tiny_run.out)[0]["settings"]
    support_run.check_settings(settings)
    with pytest.raises(SystemExit, match=f"--{list(wrong)[0] if len(wrong) == 1 else ''}.*{words}"):
        support_run.check_settings(settings | wrong)


class Hostile:
    def __reduce__(self):
        return os.system, ("echo hacked",)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Everything that the commands below name, in {folder}; the repository is {here}."""
    folder = tmp_path_factory.mktemp("places")
    torch.manual_seed(0)
    for name in ("empty", "hostile", "texts", "one", "oobleck", "older", "others", "mixed"):
        (folder / name).mkdir()
    for i in range(4):
        (folder / "texts" / f"{i}.jpg").write_text("not an image")
    Image.new("RGB", (64, 64)).save(folder / "one" / "0.png")
    torch.save({"settings": Hostile()}, folder / "hostile" / "ckpt.pt")
    torch.save({"state_dict": Hostile()}, folder / "hostile" / "vae.ckpt")
    torch.save({"weights": torch.ones(1)}, folder / "others" / "ckpt.pt")
    torch.save({"weights": torch.ones(1)}, folder / "others.pth")
    (folder / "half.safetensors").write_bytes(b"x" * 1000)
    (folder / "oobleck" / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    (folder / "wrong.py").write_text("batch_size = 4\nstesp = 1\n")
    kl(3, latent_channels=3).save_pretrained(folder / "kl-f4")
    return folder


@pytest.fixture(scope="module")
def mistaken(places):
    """The same, once a run is in {folder}/run too."""
    tiny = trained_once()
    shutil.copytree(tiny.out, places / "run"), shutil.copytree(tiny.folder, places / "pictures")
    older = load(tiny.out / "ckpt.pt")
    del older["replay"]
    torch.save(older, places / "older" / "ckpt.pt")
    shutil.copy(tiny.out / "taesd_encoder.pth", places / "lone_encoder.pth")
    shutil.copy(tiny.out / "taesd_encoder.pth", places / "nameless.pth")
    (places / "half.pth").write_bytes((tiny.out / "taesd_encoder.pth").read_bytes()[:5000])
    shutil.copy(tiny.out / "taesd_decoder.pth", places / "mixed" / "taesd_decoder.pth")
    export.save_taesd(str(places / "mixed" / "taesd_encoder.pth"), Encoder(width=8))
    return places


RESUME, TOY = "--init_from=resume --max_iters=999 --out_dir={folder}/run", "::{here}/assets/toy_vae"
MISTAKES = [  # arguments, what the line must say
    ("--lerning_rate=1", "did you mean learning_rate"), ("--batch_size=big", "a whole number, for example 16"),
    ("batch_size=8", "--name=value"), ("--learning_rate=-1", "0 or more"), ("--batch_size=0", "more than 0"),
    ("recipes/taesd.py", "no such file of settings"), ("{folder}/wrong.py", "stesp: did you mean"),
    ("--compile=maybe", "auto, true or false"), ("--dtype=float8", "bfloat16 or float16"),
    ("--profile=9 --max_iters=9", "raise --max_iters"), ("--device=tpu9", "--device=tpu9: cannot be used here"),
    ("--latent_noise=1 {here}/recipes/taesd_1.2.py", "latent_noise=0"),
    ("--crop=50", "multiple of 8"), ("--eval_size=8", "16 or more"), ("--variant=f32", "factor 32"),
    ("{here}/recipes/seraena.py --adversarial_start=5", "--mse_weight=1 is one"),
    ("--adversarial_weight=0 --mse_weight=0 --lowres_weight=0", "the decoder has no loss"),
    ("--adversarial_start=1 --mse_weight=0 --lowres_weight=0", "until then"),
    ("--adversarial_scaling=adaptive --mse_weight=0 --lowres_weight=0", "needs a pixel loss"),
    # images
    ("--data_dir=nowhere", "no such folder"), ("--data_dir={folder}/empty", "holds no .jpg"),
    ("--data_dir={folder}/one", "at least two images"), ("--data_dir={folder}/texts", "held-out images can be read"),
    ("--data_dir={folder}/texts --val_dir={folder}/pictures", "more than half"),
    ("--data_dir={folder}/pictures --val_dir={folder}/texts", "name others with --val_dir="),
    # teachers
    ("--teacher=sdlx", "did you mean sdxl"), ("--teacher=stranger/vae", "a local diffusers folder will do"),
    ("--teacher={folder}/oobleck", "AutoencoderOobleck"), ("--teacher={folder}/empty", "no config.json"),
    ("--teacher=gone_encoder.pth", "no such file"), ("--teacher=gone.safetensors", "no such file"),
    ("--teacher={folder}/hostile/ckpt.pt", "ckpt.pt"), ("--teacher={folder}/hostile/vae.ckpt" + TOY, "vae.ckpt"),
    ("--teacher={folder}/half.safetensors" + TOY, "half.safetensors"),
    ("--teacher={folder}/lone_encoder.pth", "lone_decoder.pth, is missing"),
    ("--teacher={folder}/mixed/taesd_decoder.pth", "name the encoder of a pair"),
    # starts
    ("--init_from=toy", "a run's out_dir"), ("--init_from={folder}/pictures/0.jpg", "no such weights"),
    ("--init_from={folder}/half.pth", "half.pth: not a readable weights file"),
    ("--init_from={folder}/half.safetensors", "half.safetensors: not a readable weights file"),
    ("--init_from={here}/assets/toy_vae/diffusion_pytorch_model.safetensors", "a VAE of full size is a --teacher="),
    ("--init_from={folder}/others.pth", "not an encoder or decoder in taesd.py's layout"),
    ("--init_from={folder}/others", "not a checkpoint of train.py"), ("--init_from={folder}/hostile", "ckpt.pt"),
    ("--init_from={folder}/mixed/taesd_encoder.pth", "encoder and decoder differ"),
    ("--init_from={folder}/kl-f4", "its class is AutoencoderKL"), ("--max_iters=0", "--init_from=donor for one"),
    ("--init_from=resume", "no such file"), ("--out_dir={folder}/run", "--init_from=resume goes on with it"),
    (RESUME + " --width=8", "keeps its width, 16"), (RESUME + " --teacher={folder}/kl-f4", "'factor': 8"),
    (RESUME + " --optimizer=adam", "keeps its optimizer, muon"), (RESUME + " --crop=64", "keeps its crop, 32"),
    (RESUME.replace("/run", "/older"), "another version, it lacks replay")]


@pytest.mark.parametrize("arguments,words", MISTAKES)
def test_a_mistake_is_one_clear_line(arguments, words, mistaken, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # a closed port of this machine
    before = {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()}
    arguments = [argument.format(folder=mistaken, here=HERE) for argument in arguments.split()]
    tiny = [] if "--init_from=resume" in arguments[:-1] else TINY
    with pytest.raises(SystemExit) as ended:
        train(*tiny, f"--out_dir={tmp_path / 'out'}", *arguments)
    line = ended.value.code
    assert line.startswith("error: ") and "\n" not in line and words in line and len(line) < 600
    assert "hacked" not in "".join(capfd.readouterr()) and not (tmp_path / "out").exists()
    assert before == {path: path.read_bytes() for path in mistaken.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arguments,words", [
    ("--out_dir={folder}/empty", "there is no run here yet"), ("--out_dir={folder}/hostile", "ckpt.pt"),
    ("--out_dir={folder}/run --count=0", "more than 0"), ("--out_dir={folder}/run --export_dtype=int8", "float16"),
    ("--out_dir={folder}/run --images={folder}/nowhere", "no such folder"),
    ("--teacher=toy --size=50", "multiple of 8"), ("--teacher=toy --size=8", "16 or more"),
    ("--teacher=toy --size=64,", "16 or more"), ("--teacher=toy --size=big", "or 0, for whole pictures"),
    ("--teacher=toy --compare=nothing", "--compare=nothing: no such weights"), ("--curves=gone", "not a readable log"),
    ("--out_dir={folder}/run --size=0", "it needs --images="), ("--teacher=toy --export", "of a run alone"),
    ("--teacher=toy --json={folder}/nowhere/f.json", "there is no such folder"),
    ("--out_dir={folder}/run --images={folder}/texts", "can be read"), ("--teacher=sdlx", "did you mean sdxl"),
    ("--out_dir={folder}/run --compare={folder}/gone.pth", "no such file"),
    ("--teacher=toy --images={folder}/empty", ".jpg"), ("--out_dir={folder}/run --device=tpu9", "--device=tpu9"),
    ("--out_dir={folder}/run --compare={folder}/f4.pth", "has 4 channels at factor 4")])
def test_mistakes_of_sample(arguments, words, mistaken):
    export.save_taesd(str(mistaken / "f4.pth"), Encoder(4, 4, 8))
    with pytest.raises(SystemExit) as ended:
        script("sample.py", "--device=cpu", *(each.format(folder=mistaken) for each in arguments.split()))
    assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code and words in ended.value.code
    assert not (mistaken / "run" / "samples" / "sample.png").exists()


@pytest.mark.parametrize("arguments,words", [((), "nothing to do"), (("--longest=0",), "more than 0"),
                                             (("--data_dir=nowhere", "--out=pack"), "no such folder")])
def test_mistakes_of_data(arguments, words):
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        script("data.py", *arguments)


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    quiet = {"PYTHONWARNINGS": "ignore"}  # those of torch's CUDA builds where there is no GPU
    process = start("train.py", *TINY, "--crop=50", f"--out_dir={tmp_path / 'out'}", **quiet)
    output, errors = process.communicate()
    assert process.returncode == 1 and output == "" and errors.count("\n") == 1
    assert errors.startswith("error: --crop=50: must be 16 or more and a multiple of 8 for this teacher")


@pytest.mark.parametrize("asked, start, expected", [("auto", None, "plain"), ("auto", "midblock_gn", "midblock_gn"),
                                                    ("plain", "midblock_gn", "plain")])
def test_the_variant_is_the_starts_or_else_the_teachers(asked, start, expected):
    teacher = types.SimpleNamespace(multiple=8, factor=8, student_variant="plain")
    settings = {"variant": asked, "crop": 32, "eval_size": 64}
    found = support_run.check_fit(settings, teacher, start and {"shape": {"variant": start}})
    assert found == settings["variant"] == expected
