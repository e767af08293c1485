"""From a trained supernet to plain models of several sizes: searched, cut out, measured, recommended."""
