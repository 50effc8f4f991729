# Which two blocks of DeiT-tiny keep softmax attention in the configs named retain2: measured, see docs/beyond.md.
retained = (1, 2)
retained_softmax = [
    dict(type='adala_mm.SoftmaxAttention' if block in retained else 'adala_mm.LinearAttention') for block in range(12)]
