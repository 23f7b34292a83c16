"""Pre-training without labels by denoising: l-DAE (Chen, Liu, Xie & He 2024), as functions of plain arguments."""
