"""Data sets: synthetic shapes, folders in COCO layout, and the batches made of them.

    shapes  coco_folder  transforms  batches  dataset
"""
