"""What the authors' code adds to the papers, and how published weights load.

    deformable  dac_release  align_loss  denoising  swin
    published  published_conditional
"""
