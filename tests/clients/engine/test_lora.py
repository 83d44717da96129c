"""Adapters on a frozen base: their arithmetic, what is sent of them, and layers that they would not reach."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from murmur import load_base, lora, merge_lora
from murmur.clients.engine.loop import run_job
from murmur.clients.engine.lora import LoRALinear
from murmur.clients.engine.session import Session
from murmur.clients.engine.state import initial_model, layout_of, parts_of
from murmur.protocol.errors import OperatorError
from murmur.protocol.sections import Dp
from murmur.protocol.tensors import read_layout

from .test_loop import HARD, apart, size


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))


def moved(model, seed=2):
    """The model with adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


def test_an_adapted_model_begins_at_its_base_and_trains_the_adapters_alone():
    plain, x = network(), torch.randn(3, 6)
    model = lora(copy.deepcopy(plain), rank=2)
    assert torch.equal(model(x), plain(x))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.{half}.weight" for layer in (0, 2) for half in ("down", "up")
    }
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in plain.state_dict().items())  # names stay as they were


def test_the_output_is_the_bases_plus_alpha_over_rank_times_up_down():
    model, x = moved(lora(network(), rank=2, alpha=6)), torch.randn(3, 6)
    w, b, a, u = (model[0].get_parameter(n).detach() for n in ("weight", "bias", "down.weight", "up.weight"))
    assert torch.allclose(model[0](x), x @ (w + 3 * u @ a).T + b, atol=1e-5)


def test_down_is_drawn_from_the_layers_name_and_the_seed_alone():
    torch.manual_seed(5)
    one = lora(network())
    torch.manual_seed(6)
    two, three = lora(network()), lora(network(), seed=1)
    assert torch.equal(one[0].down.weight, two[0].down.weight)
    assert not torch.equal(one[0].down.weight, three[0].down.weight)
    assert float(one[0].down.weight.detach().abs().max()) <= 1 / math.sqrt(6)
    assert float(one[0].down.weight.detach().std()) > 0.15


def test_a_merged_model_gives_the_same_output_in_ordinary_layers():
    model, x = moved(lora(network(), rank=2)), torch.randn(3, 6)
    wanted = model(x)
    merged = merge_lora(model)
    assert torch.allclose(merged(x), wanted, atol=1e-5)
    assert [type(m) for m in merged] == [nn.Linear, nn.ReLU, nn.Linear]
    assert {*merged.state_dict()} == {*network().state_dict()}


def test_a_half_precision_base_has_adapters_in_full_precision():
    model = moved(lora(network().bfloat16(), rank=2))
    x = torch.randn(3, 6).bfloat16()
    assert model(x).dtype == torch.bfloat16 and model[0].up.weight.dtype == torch.float32
    assert torch.allclose(merge_lora(copy.deepcopy(model))(x).float(), model(x).float(), rtol=0.05, atol=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora(network())(torch.randn(3, 6)).sum().backward()


def test_what_trains_whole_gets_no_adapter():
    model = lora(network(), train=("2.*",))
    assert isinstance(model[0], LoRALinear) and type(model[2]) is nn.Linear and model[2].weight.requires_grad
    assert [type(m) for m in lora(network(), targets=("2",))] == [nn.Linear, nn.ReLU, LoRALinear]


def test_torchs_fused_encoder_layer_does_not_pass_adapters_by():
    # In evaluation nn.TransformerEncoderLayer reads linear1.weight itself, without a call of the layer.
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = moved(lora(nn.Sequential(layer), targets=("*.linear?",)))
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), model.train()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0.0}, "alpha = 0"),
        ({"targets": "2"}, r"write a tuple of name patterns, as \('2',\)"),
        ({"targets": ("2", "3")}, "targets names '3', which fits none of what there is: 0, 2"),
        ({"train": ("head.*",)}, r"train names 'head\.\*', which fits none"),
        ({"train": ("*",)}, r"targets names '\*', which fits none of what there is: nothing"),
    ],
)
def test_settings_that_cannot_be_are_told(settings, words):
    model = network()
    with pytest.raises(OperatorError, match=words):
        lora(model, **settings)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_are_read_past_their_forward_get_no_adapter():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert [n for n, m in lora(model).named_modules() if isinstance(m, LoRALinear)] == ["1"]
    with pytest.raises(OperatorError, match=r"targets names '0\.out_proj'"):
        lora(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), targets=("0.out_proj", "1"))


# The base, from a file


def test_a_base_is_mapped_and_not_copied(tmp_path):
    save_file({"0.weight": torch.randn(2048, 2048), "0.bias": torch.zeros(2048)}, tmp_path / "base")  # 16 MiB

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))  # KiB

    before = anonymous()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2048, 2048))
    model.append(nn.Linear(2048, 2))
    lora(load_base(model, tmp_path / "base"), train=("1.*",))
    parts_of(model)  # touches every page
    assert anonymous() - before < 4096
    assert [n for n, p in model.named_parameters() if p.requires_grad and "down" not in n] == [
        "0.up.weight",
        "1.weight",
        "1.bias",
    ]


def test_a_base_that_is_not_the_models_is_told(tmp_path):
    for tensors, words in (
        ({"3.weight": torch.zeros(2)}, "has a tensor '3.weight', and the model has none"),
        ({"0.bias": torch.zeros(2)}, r"'0.bias' is \[2\], and \[5\] in the model"),
    ):
        save_file(tensors, tmp_path / "base")
        with pytest.raises(OperatorError, match=words):
            load_base(network(), tmp_path / "base")
    (tmp_path / "base").write_bytes(b"no")
    with pytest.raises(OperatorError, match="base cannot be read"):
        load_base(network(), tmp_path / "base")
    save_file({"0.bias": torch.zeros(5)}, tmp_path / "base")
    with torch.device("meta"):
        model = network()
    with pytest.raises(OperatorError, match="2 tensors of the model have no values and are not in the base"):
        load_base(model, tmp_path / "base")


def test_tied_weights_of_a_base_are_in_its_file_once(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    save_file({"embed.weight": torch.ones(5, 3)}, tmp_path / "base")
    load_base(model, tmp_path / "base")
    assert torch.equal(model["head"].weight, torch.ones(5, 3)) and not model["head"].weight.requires_grad
    assert parts_of(model).frozen == ("embed.weight",)


# In training


@pytest.mark.parametrize("freeze_a", [False, True])
def test_only_what_trains_is_sent_and_the_base_is_the_same_afterwards(freeze_a, task, make_job):
    options = {"freeze_a": freeze_a}
    adapted, job, session = task("Adapted", **options), make_job("Adapted", options, **HARD), Session()
    run_job(adapted, job, session=session)
    sent = read_layout(job.update)
    trained = sum(p.numel() for p in adapted.model().parameters() if p.requires_grad)
    # 8 -> 16 and 16 -> 16 with two each in and out, and a head of 16 -> 3: by hand
    by_hand = 2 * (16 + 16) + 16 * 3 + 3 + (0 if freeze_a else 2 * (8 + 16))
    assert sent.nbytes == 4 * trained == 4 * by_hand
    assert job.update.stat().st_size == sent.file_bytes
    assert parts_of(session.module).base == read_layout(job.model).base


def test_the_mean_of_up_is_the_mean_of_the_products_only_where_down_is_frozen():
    def product(model):
        return model[0].up.weight @ model[0].down.weight

    for freeze_a, exact in ((True, True), (False, False)):
        clients = [moved(lora(network(), freeze_a=freeze_a), seed) for seed in (3, 4)]
        mean = lora(network(), freeze_a=freeze_a)
        with torch.no_grad():
            for name, p in mean.named_parameters():
                p.copy_(sum(c.get_parameter(name) for c in clients) / 2)
            wanted = sum(product(c) for c in clients) / 2
        assert torch.allclose(product(mean), wanted, atol=1e-5) is exact


@pytest.mark.parametrize("megabytes", [48, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_base_of_any_size_is_never_sent(megabytes, task, make_job, tmp_path):
    width = 4096 * megabytes // 64
    with (tmp_path / "base").open("wb") as file:  # zeros that take no room on disk
        header = b'{"0.weight":{"dtype":"F32","shape":[%d,4096],"data_offsets":[0,%d]}}' % (width, width * 4096 * 4)
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + width * 4096 * 4)

    def model():
        with torch.device("meta"):
            base = nn.Sequential(nn.Linear(4096, width, bias=False))
        base = lora(load_base(base, tmp_path / "base"), rank=1)
        return nn.Sequential(nn.ConstantPad1d((0, 4088), 0.0), base, nn.Linear(width, 3))

    rows = task(n=4, test=0)
    rows.model = model
    layout = initial_model(rows, 7, tmp_path / "m")
    trained = 4 * (4096 + width + 3 * width + 3)
    assert layout.nbytes == trained and (tmp_path / "m").stat().st_size == layout.file_bytes < trained + 1000
    job = replace(make_job(batch_size=4), model=tmp_path / "m")
    run_job(rows, job)
    assert job.update.stat().st_size < trained + 1000 < megabytes << 20


def test_adapters_train_by_dp_sgd_over_a_frozen_batch_norm(task, make_job, alone):
    # Noise 0 and a bound that no gradient reaches: DP-SGD over everything at once is a step of plain training.
    settings = {"batch_size": 63, "epochs": 1, "lr": 0.1, "metrics": ()}
    private = Dp(mode="local", clip_norm=1e6, noise_multiplier=0.0)
    for name in ("Adapted", "Fixed"):
        plain, wanted = alone(name, **settings)[0], alone(name, **settings, dp=private)[0]
        assert size(plain) > 1e-3 and apart(plain, wanted) < 1e-6


def test_layouts_of_adapted_models_do_not_depend_on_the_order_of_targets():
    one, two = lora(network(), targets=("0", "2")), lora(network(), targets=("2", "0"))
    assert layout_of(one) == layout_of(two)
