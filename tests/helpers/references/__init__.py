"""Slow float64 transcriptions of published formulas, which use nothing of adala_mm.

Each says whose equation it is, and sees a layer's parameters alone (`without_code`). test_transcriptions.py sees that
every attention has one.
"""
