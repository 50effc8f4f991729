# Attentions of the paper's baselines, with the numbers of a ViT-L: 16 heads of D = 64, C = 1024 channels, 24 layers.
# Where its text gives none, they follow from the columns of its Tables 4 and 10, at N = 1,025 and 4,097 tokens.
hedgehog = dict(type='adala_mm.HedgehogAttention')
# r and alpha as published with LoLCATS.
lolcats = dict(type='adala_mm.LoLCATSAttention', rank=8, alpha=16.0)
# 1.57 M more parameters: 2 matrices x 1,025 tokens x 32 x 24 layers. FLOPs of vanilla linear attention: in each head,
# 4 N R D = 2 N D^2.
linformer = dict(type='adala_mm.LinformerAttention', rank=32)
# Twice the FLOPs of vanilla linear attention: 4 N M D in each head, with M = 64.
performer = dict(type='adala_mm.PerformerAttention', num_features=64)
cosformer = dict(type='adala_mm.CosformerAttention')
# A.2: 128, "which is the head dimension". A ViT-L's is 64, which the FLOPs would fit.
nystromformer = dict(type='adala_mm.NystromformerAttention', num_landmarks=128)
# 10.48 GFLOP above the rest of the network, 83.78 at N = 4,097: (4 T + 1) N^1.5 C in each layer with T = 3 and blocks
# as wide as the grid; class and register tokens are in a block like others.
monarch = dict(type='adala_mm.MonarchAttention', num_steps=3, exact_prefix=False)
