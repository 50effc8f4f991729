"""Linearized models under what traces, compiles, batches and differentiates them: right, or refused with a reason.

Each is compared with the model called in the plain way, at another batch or size than the one that was traced.
"""
from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import adala_mm
from adala_mm import linearize
from adala_mm.models.attentions import Attention
from adala_mm.registry import ATTENTIONS
from helpers.layers import attention
from helpers.vits import HF, SIZES, awaken, build, run, timm_vit

ATTENTIONS.import_from_location()
KINDS = sorted(ATTENTIONS.module_dict)
SOME = ('LinearAttention', 'RALAAttention', 'HedgehogAttention')
UNPACKED = dict(type='adala_mm.LinearAttention', center_keys=True, dwconv=3)  # q, k and v one by one
TRACED, BATCH = SIZES[1], 3  # (24, 40) pixels, traced with two images
HOLD_FOR_ONE_SIZE = ('NystromformerAttention', 'ViGAttention')
every_kind = pytest.mark.parametrize('kind', KINDS)
some_kinds = pytest.mark.parametrize('kind', SOME)
pytestmark = pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')


def linear_vit(kind: str | dict, **changes) -> nn.Module:
    """A timm ViT of one block, in float64, with weights that make every part of the attention visible."""
    model = linearize(awaken(timm_vit('dinov2_reg4', depth=1, **changes)),
                      attention(kind) if isinstance(kind, str) else kind)
    for module in model.modules():
        for parameter in module.parameters() if isinstance(module, Attention) else ():
            nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def images(batch: int = 2, size: tuple[int, int] = TRACED) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def energy(model: nn.Module):
    return lambda image: model(image).square().sum()


# --- graphs -----------------------------------------------------------------------------------------------------------

@every_kind
@torch.no_grad()
def test_jit_trace_holds_for_other_batches_and_sizes(kind):
    model = linear_vit(kind)
    traced = torch.jit.trace(model, images())
    other = images(BATCH)
    close(traced(other), model(other))
    assert 'adala_mm::' not in str(traced.inlined_graph)  # no operator of ours
    other = images(BATCH, (40, 48))
    if kind in HOLD_FOR_ONE_SIZE:
        with pytest.raises(RuntimeError, match='size'):
            traced(other)
    else:
        close(traced(other), model(other))


@torch.no_grad()
@pytest.mark.parametrize('family', ['siglip', 'eva02', 'hf_vit', 'hf_dinov2', 'hf_clip', 'hf_siglip', 'mmpretrain',
                                    'adala'])
def test_jit_trace_in_other_families(family):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = linearize(build(family).double())

        def forward(self, image: Tensor) -> Tensor:
            return run(self.model, image)

    tokens = Tokens()
    traced = torch.jit.trace(tokens, images())
    for other in (images(BATCH), images(1, (40, 48))):
        close(traced(other), tokens(other))


def test_a_trace_does_not_know_how_many_landmarks_a_grid_has():
    model = linearize(timm_vit(), dict(type='nystromformer', num_landmarks=9, landmarks='grid'))
    with pytest.raises(ValueError, match="landmarks='grid'.*use torch.export with a fixed size"):
        torch.jit.trace(model, torch.zeros(1, 3, 32, 32))


@some_kinds
@torch.no_grad()
def test_make_fx(kind):
    model, other = linear_vit(kind), images(BATCH)
    graph = make_fx(model, tracing_mode='symbolic', _allow_non_fake_inputs=True)(images())
    close(graph(other), model(other))
    assert not [node for node in graph.graph.nodes if 'adala_mm' in str(node.target)]


@pytest.mark.parametrize(('kind', 'strict'), [*((kind, False) for kind in SOME), ('LinearAttention', True)])
@torch.no_grad()
def test_torch_export(kind, strict):
    model, other = linear_vit(kind), images(BATCH)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: Dim('batch')},), strict=strict)
    close(program.module()(other), model(other))
    assert not [node for node in program.graph.nodes if 'adala_mm' in str(node.target)]


@pytest.mark.parametrize('family', [name for name in HF if name not in ('hf_deit', 'hf_dpt', 'hf_backbone')])
@torch.no_grad()
def test_graphs_of_transformers(family):
    """transformers 5 gives its attentions a mask in every graph, whether the caller has one or not."""
    model, other = linearize(build(family).double(), keep_softmax=[0]), images(BATCH, (32, 32))
    program = torch.export.export(model, (images(size=(32, 32)),), dynamic_shapes={'pixel_values': {0: Dim('batch')}})
    for graph in (program.module(), torch.compile(model, backend='eager', fullgraph=True)):
        close(graph(other)[0], model(other)[0])
    if family in ('hf_dinov2', 'hf_dinov2_with_registers'):
        with pytest.raises(ValueError, match='(attention|head)_mask needs attention weights'):
            torch.export.export(model, (other, None, torch.ones(BATCH, 17)))


@pytest.mark.parametrize('kind', [*SOME, 'AgentAttention', 'InLineAttention'])
def test_the_older_onnx_exporter(kind, tmp_path):
    """At one size, as it cannot resize timm's positions; at any batch."""
    from adala_mm.export.graphs import quiet, session
    model, other = linear_vit(kind, dynamic_img_size=False).float(), torch.randn(BATCH, 3, 32, 32)
    with quiet():
        torch.onnx.export(model, (other[:2],), tmp_path / 'model.onnx', dynamo=False, opset_version=18,
                          input_names=['image'], dynamic_axes={'image': {0: 'batch'}})
    with torch.no_grad():
        torch.testing.assert_close(session(tmp_path / 'model.onnx')(other)[0], model(other), rtol=1e-4, atol=1e-4)


def test_the_newer_onnx_exporter(tmp_path):
    from adala_mm.export.graphs import quiet, session
    model, other = linear_vit('LinearAttention').float(), torch.randn(BATCH, 3, 32, 48)
    with quiet(), torch.no_grad():
        torch.onnx.export(model, (torch.randn(2, 3, *TRACED),), tmp_path / 'model.onnx', dynamo=True, opset_version=18,
                          input_names=['image'], verbose=False,
                          dynamic_shapes=({0: Dim('batch'), 2: 8 * Dim('rows'), 3: 8 * Dim('columns')},))
        torch.testing.assert_close(session(tmp_path / 'model.onnx')(other)[0], model(other), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_torch_compile():
    model = linear_vit('LinearAttention')
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True, dynamic=True)
    for image in (images(), images(BATCH, (40, 48))):
        close(compiled(image), model(image))


def test_jit_script_is_refused():
    for model in (linear_vit('LinearAttention'), build('adala')):
        with pytest.raises(TypeError, match='torch.jit.script does not compile .*Attention: use torch.jit.trace'):
            torch.jit.script(model)


# --- torch.fx ---------------------------------------------------------------------------------------------------------

def fixed_vit(kind: str = 'LinearAttention') -> nn.Module:
    """torch.fx follows no dynamic size, in timm's own models either. Two blocks, the second keeps its softmax."""
    model = awaken(timm_vit('dinov2_reg4', depth=2, dynamic_img_size=False))
    return linearize(model, attention(kind), keep_softmax=[1]).double().eval()


@every_kind
@torch.no_grad()
def test_fx_takes_an_attention_for_one_operation(kind):
    model, other = fixed_vit(kind), images(BATCH, (32, 32))
    graph = torch.fx.symbolic_trace(model)
    close(graph(other), model(other))
    assert 'blocks.0.attn' in [node.target for node in graph.graph.nodes if node.op == 'call_module']


@torch.no_grad()
def test_feature_extractors():
    """torchvision's by names of nodes, timm's by modules and by its own method: the same tokens as a hook sees."""
    from timm.models._features import FeatureGetterNet
    from timm.models._features_fx import create_feature_extractor as timm_feature_extractor
    from torchvision.models.feature_extraction import create_feature_extractor
    model, other, seen = fixed_vit(), images(BATCH, (32, 32)), {}
    for name in ('blocks.0', 'blocks.0.attn'):
        model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: seen.update(
            {name: output}))
    model(other)
    wanted = dict(seen)
    extractor = create_feature_extractor(model, ['blocks.0', 'blocks.0.attn'])
    for name, tokens in extractor(other).items():
        close(tokens, wanted[name])
    assert extractor.train()(other).keys() == wanted.keys()
    close(timm_feature_extractor(model, ['blocks.0'])(other)['blocks.0'], wanted['blocks.0'])
    maps = FeatureGetterNet(model, out_indices=[0], norm=False)(other)[0]
    close(maps.flatten(2).transpose(1, 2), wanted['blocks.0'][:, 5:])


# --- torch.func -------------------------------------------------------------------------------------------------------

@every_kind
@torch.no_grad()
def test_vmap(kind):
    model, image = linear_vit(kind), images()
    close(vmap(lambda one: model(one[None])[0])(image), model(image))


@some_kinds
def test_functional_call_of_an_ensemble(kind):
    model, image = linear_vit(kind), images()
    weights = {name: torch.stack([value, 1.1 * value]) for name, value in model.named_parameters()}
    outputs = vmap(lambda member: functional_call(model, member, (image,)))(weights)
    for i, output in enumerate(outputs):
        close(output, functional_call(model, {name: value[i] for name, value in weights.items()}, (image,)))


@pytest.mark.parametrize('kind', [*SOME, UNPACKED], ids=str)
def test_derivatives_by_torch_func(kind):
    """Against autograd, and second derivatives against differences of first ones."""
    model, image, direction = linear_vit(kind), images(), images()
    leaf = image.clone().requires_grad_()
    wanted, = torch.autograd.grad(energy(model)(leaf), leaf)
    close(grad(energy(model))(image), wanted)
    close(jvp(energy(model), (image,), (direction,))[1], (wanted * direction).sum())
    with torch.no_grad(), forward_ad.dual_level():
        output = forward_ad.unpack_dual(energy(model)(forward_ad.make_dual(image, direction)))
    close(output.tangent, (wanted * direction).sum())
    row, = torch.autograd.grad(model(leaf)[0, 1], leaf)
    close(jacrev(lambda x: model(x)[0, 1])(image), row)
    second = jvp(grad(energy(model)), (image,), (direction,))[1]
    step = 1e-6 * direction
    slope = (grad(energy(model))(image + step) - grad(energy(model))(image - step)) / 2e-6
    torch.testing.assert_close(second, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', [*SOME, UNPACKED], ids=str)
def test_second_derivatives_by_autograd(kind):
    model, direction = linear_vit(kind), images()
    image = images().requires_grad_()
    wanted = jvp(grad(energy(model)), (image.detach(),), (direction,))[1]
    first, = torch.autograd.grad(energy(model)(image), image, create_graph=True)
    close(torch.autograd.grad((first * direction).sum(), image)[0], wanted)


@every_kind
def test_forward_mode_is_right_or_refused(kind):
    """A tangent is never lost in silence. PyTorch has none of its softmax attention, and says so."""
    model, image, direction = linear_vit(kind), images(), images()
    leaf = image.clone().requires_grad_()
    row, = torch.autograd.grad(energy(model)(leaf), leaf)
    with torch.no_grad(), forward_ad.dual_level():
        try:
            output = energy(model)(forward_ad.make_dual(image, direction))
        except NotImplementedError as error:
            assert 'Trying to use forward AD with _scaled_dot_product' in str(error)
            return
        close(forward_ad.unpack_dual(output).tangent, (row * direction).sum())


def test_no_warning_of_ours_in_a_trace():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.jit.trace(linear_vit('LinearAttention'), images())
    ours = Path(adala_mm.__file__).parent  # and not what a clone of that name has in its environment
    assert not [warning for warning in caught if ours in Path(warning.filename).parents]
