"""Without training: consumers refitted after a cut, batch norms measured again."""
