"""Layer by layer over calibration text: what every calibrated method shares, whatever it does to a block."""
