"""What the tools in `tools/analysis_tools` share: networks by config and checkpoint, their images, and measures."""
from adala_mm.analysis.attention_maps import attention_entropy
from adala_mm.analysis.cli import add_size, analysis_parser, find_images, open_networks, positive
from adala_mm.analysis.comparison import Comparison
from adala_mm.analysis.images import normalise, read_image
from adala_mm.analysis.networks import Network, Spec, load_networks, require_distinct, require_equal
from adala_mm.analysis.outputs import outputs, write
from adala_mm.analysis.prediction import classify, load_predictor, output_paths, segment
from adala_mm.analysis.similarity import MinibatchCKA, knn_agreement, probe_agreement, unbiased_hsic

__all__ = ['Comparison', 'MinibatchCKA', 'Network', 'Spec', 'add_size', 'analysis_parser', 'attention_entropy',
           'classify', 'find_images', 'knn_agreement', 'load_networks', 'load_predictor', 'normalise',
           'open_networks', 'output_paths', 'outputs', 'positive', 'probe_agreement', 'read_image',
           'require_distinct', 'require_equal', 'segment', 'unbiased_hsic', 'write']
