"""A weight in another form than a tensor."""


class Rows:
    """A weight that is only available as blocks of rows."""

    def __init__(self, weight):
        self.weight, self.shape, self.dtype, self.device = weight, weight.shape, weight.dtype, weight.device

    def __len__(self):
        return len(self.weight)

    def __getitem__(self, rows):
        return self.weight[rows].clone()
