"""Tiny models of transformers with a ViT inside."""
from __future__ import annotations

import transformers
from torch import nn

from helpers.vits import MLP

SMALL = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8)
NECK = dict(neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16)
DECODER = dict(hidden_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=32,
               encoder_feedforward_dim=32, num_queries=5)


def backbone(kind: str = 'Dinov2', **changes) -> transformers.PretrainedConfig:
    return getattr(transformers, f'{kind}Config')(**SMALL, out_indices=[1, 2, 3, 4], **changes)


def model_of(kind: str, **options) -> nn.Module:
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**options))


def depth_anything(**changes) -> nn.Module:
    return model_of('DepthAnythingForDepthEstimation', backbone_config=backbone(reshape_hidden_states=False),
                    patch_size=8, reassemble_hidden_size=32, head_hidden_size=8, **NECK, **changes)


def eomt(**changes) -> nn.Module:
    return model_of('EomtForUniversalSegmentation', **SMALL | dict(num_hidden_layers=6), num_blocks=2, num_queries=5,
                    num_upscale_blocks=1, num_register_tokens=2, num_labels=3, **changes)


AROUND = {  # how it is made, and what it answers with
    'classifier': (lambda: model_of('ViTForImageClassification', **SMALL, **MLP), 'logits'),
    'masked images': (lambda: model_of('ViTForMaskedImageModeling', **SMALL, **MLP, encoder_stride=8),
                      'reconstruction'),
    'DeiT with two heads': (lambda: model_of('DeiTForImageClassificationWithTeacher', **SMALL, **MLP), 'logits'),
    'Depth Anything': (depth_anything, 'predicted_depth'),
    'DPT': (lambda: model_of('DPTForDepthEstimation', **SMALL | dict(image_size=64, patch_size=16), **MLP, **NECK,
                             backbone_out_indices=[0, 1, 2, 3]), 'predicted_depth'),
    'DPT on DINOv2': (lambda: model_of('DPTForDepthEstimation', **NECK, backbone_config=backbone(
        reshape_hidden_states=False)), 'predicted_depth'),
    'Mask2Former': (lambda: model_of('Mask2FormerForUniversalSegmentation', backbone_config=backbone(), feature_size=32,
                                     mask_feature_size=32, **DECODER), 'masks_queries_logits'),
    'UPerNet': (lambda: model_of('UperNetForSemanticSegmentation', backbone_config=backbone('Dinov2WithRegisters'),
                                 hidden_size=16, use_auxiliary_head=False, num_labels=3), 'logits'),
    'EoMT': (eomt, 'masks_queries_logits'),
}
