"""What people look at: figures, drawings, pages."""
