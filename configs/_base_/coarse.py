# CoarseToFineAttention for images of 512 px and more: 24 tiles of 4 x 4 patches are open, of 8 x 8 tiles or more.
coarse_attention = dict(type='adala_mm.CoarseToFineAttention', num_open=24)
