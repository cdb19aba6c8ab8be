"""detr_min: DAC-DETR and Decoupled DETR, one concept a file, read beside the papers.

Read in this order; a file imports only from files above it:

    boxes  attention  position  backbone  backbone_swin  encoder  proposals  query_gen
    denoising  decoder_base  decoder_dac  decoder_release  decoder_decoupled
    matcher  tal_loss  align_loss  criterion  model
    shapes  coco_folder  data  evaluate  draw  config  optim  published  checkpoints  runs

Shapes use these letters, and no others:

    B  images                    N  queries             M  objects in an image    C  classes
    D  width of the model        H  attention heads     L  feature levels         K  sampling points
    S  cells of all levels       P  matched pairs       T  query sets (SD-DETR: 2, else 1)
    h, w  height and width of an image or a feature level

Boxes are cxcywh in [0, 1] of the image unless a suffix says otherwise (`_xyxy`, `_px`). In masks
called `is_pad`, True means padding.
"""
