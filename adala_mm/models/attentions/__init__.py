from adala_mm.models.attentions.agent import AgentAttention
from adala_mm.models.attentions.base import Attention
from adala_mm.models.attentions.build import build_attention
from adala_mm.models.attentions.castling import CastlingAttention
from adala_mm.models.attentions.coarse_to_fine import CoarseToFineAttention
from adala_mm.models.attentions.cosformer import CosformerAttention
from adala_mm.models.attentions.counts import blocks_by_attention
from adala_mm.models.attentions.fcvit import FCViTAttention
from adala_mm.models.attentions.focused import FocusedAttention
from adala_mm.models.attentions.hedgehog import HedgehogAttention
from adala_mm.models.attentions.inline import InLineAttention, ViTALiTyAttention
from adala_mm.models.attentions.l2vit import L2ViTAttention, WindowAttention
from adala_mm.models.attentions.linear import LinearAttention
from adala_mm.models.attentions.linformer import LinformerAttention
from adala_mm.models.attentions.lolcats import LoLCATSAttention
from adala_mm.models.attentions.mlla import MLLAAttention
from adala_mm.models.attentions.monarch import MonarchAttention
from adala_mm.models.attentions.nystromformer import NystromformerAttention
from adala_mm.models.attentions.performer import PerformerAttention
from adala_mm.models.attentions.polaformer import PolaFormerAttention
from adala_mm.models.attentions.rala import RALAAttention
from adala_mm.models.attentions.rmt import RMTAttention
from adala_mm.models.attentions.softmax import SoftmaxAttention
from adala_mm.models.attentions.vicinity import VicinityAttention
from adala_mm.models.attentions.vig import ViGAttention
from adala_mm.models.attentions.windowed_linear import WindowedLinearAttention

__all__ = ['AgentAttention', 'Attention', 'CastlingAttention', 'CoarseToFineAttention', 'CosformerAttention',
           'FCViTAttention', 'FocusedAttention', 'HedgehogAttention', 'InLineAttention', 'L2ViTAttention',
           'LinearAttention', 'LinformerAttention', 'LoLCATSAttention', 'MLLAAttention', 'MonarchAttention',
           'NystromformerAttention', 'PerformerAttention', 'PolaFormerAttention', 'RALAAttention', 'RMTAttention',
           'SoftmaxAttention', 'ViGAttention', 'ViTALiTyAttention', 'VicinityAttention', 'WindowAttention',
           'WindowedLinearAttention', 'blocks_by_attention', 'build_attention']
