"""Tables, plots, pictures of kept tokens, and pages with all of these."""

from gripvlm.report.build import report
from gripvlm.report.overlay import Geometry, GeometryError, Part, geometry, layout, layout_of_images, overlay
from gripvlm.report.tables import tables as table

__all__ = ["Geometry", "GeometryError", "Part", "geometry", "layout", "layout_of_images", "overlay", "report", "table"]
