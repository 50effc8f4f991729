# Which two blocks of DINOv2-L keep softmax attention in the configs named retain2: early ones, as DeiT-tiny's
# measurement has it (docs/beyond.md). Nobody has measured them on DINOv2-L yet: tools/analysis_tools/rank_blocks.py.
retained = (1, 2)
retained_softmax = [
    dict(type='adala_mm.SoftmaxAttention' if block in retained else 'adala_mm.LinearAttention') for block in range(24)]
