"""A right answer to exercise 6, other than the package's: by index, all written out."""
import torch

from detr_min import boxes


class DACDecoder:
    def c_decoder(self, queries, memory):
        x, looked_at, predictions = queries.content[0], queries.ref_boxes, []
        twice = queries.ref_boxes
        for depth in range(len(self.layers)):
            layer = self.layers[depth]
            read = layer.cross_attn(x + queries.pos[0], looked_at, memory)
            x = layer.norm_cross(x + read)
            x = layer.norm_ffn(x + layer.ffn(x))
            delta = self.box_heads[depth](x)
            answer = torch.sigmoid(torch.logit(twice, eps=1e-5) + delta)
            predictions.append(boxes.Predictions(self.class_heads[depth](x), answer))
            twice = torch.sigmoid(torch.logit(looked_at, eps=1e-5) + delta)
            looked_at = twice.clone().detach()
        return predictions
