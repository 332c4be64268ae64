package qupath.lib.io;

import com.google.gson.Gson;
import com.google.gson.GsonBuilder;
import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonPrimitive;
import java.io.File;
import java.io.FileInputStream;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.UUID;
import java.util.zip.GZIPInputStream;
import org.locationtech.jts.geom.Coordinate;
import org.locationtech.jts.geom.Geometry;
import org.locationtech.jts.geom.GeometryFactory;
import org.locationtech.jts.geom.LinearRing;
import org.locationtech.jts.geom.Polygon;
import org.locationtech.jts.geom.PrecisionModel;
import org.locationtech.jts.operation.valid.IsValidOp;
import org.locationtech.jts.precision.GeometryPrecisionReducer;

/**
 * Stands in for QuPath's class of this name: the same libraries (Gson, JTS), and what its readers of 0.4 to 0.7 were
 * measured to refuse. Written from those measurements, with none of QuPath's code.
 */
public class PathIO {

    private static final Gson GSON = new GsonBuilder().setLenient().create();
    private static final GeometryFactory FACTORY = new GeometryFactory();

    /** What the import script asks of an object, and what the tests compare. */
    public static class PathObject {
        String id = UUID.randomUUID().toString(); // as QuPath does where there is none
        String type = "annotation", name, className;
        int[] color;
        Map<String, Double> measurements = new HashMap<>();
        String wkt;
        double area;

        public UUID getID() {
            return UUID.fromString(id);
        }
    }

    public static List<PathObject> readObjects(File file) throws Exception {
        var name = file.getName().toLowerCase();
        var found = new ArrayList<PathObject>();
        if (!name.matches(".*\\.(geojson|json)(\\.gz)?"))
            return found;
        try (InputStream raw = new FileInputStream(file);
                var in = name.endsWith(".gz") ? new GZIPInputStream(raw) : raw) {
            add(GSON.fromJson(new InputStreamReader(in, StandardCharsets.UTF_8), JsonElement.class), found);
        }
        return found;
    }

    private static void add(JsonElement element, List<PathObject> found) throws Exception {
        if (element.isJsonArray()) {
            for (var each : element.getAsJsonArray())
                add(each, found);
            return;
        }
        var object = element.getAsJsonObject();
        var type = object.get("type").getAsString();
        if (type.equals("FeatureCollection"))
            add(object.get("features"), found);
        else if (type.equals("Feature"))
            found.add(feature(object));
        else
            found.add(shaped(new PathObject(), object));
    }

    private static PathObject feature(JsonObject feature) throws Exception {
        var made = new PathObject();
        if (feature.has("id")) {
            try {
                made.id = UUID.fromString(feature.get("id").getAsString()).toString();
            } catch (IllegalArgumentException notOne) { // keeps its own
            }
        }
        if (feature.has("properties")) {
            var properties = feature.get("properties").getAsJsonObject(); // null is refused
            if (properties.has("objectType"))
                made.type = properties.get("objectType").getAsString();
            if (properties.has("name"))
                made.name = properties.get("name").getAsString();
            if (properties.has("color") && properties.get("color").isJsonPrimitive())
                properties.get("color").getAsInt(); // "#ff0000" is refused
            if (properties.has("classification"))
                classify(made, properties.get("classification"));
            if (properties.has("measurements"))
                measure(made, properties.get("measurements"));
        }
        return shaped(made, feature.get("geometry").getAsJsonObject());
    }

    private static void classify(PathObject made, JsonElement given) {
        if (given.isJsonNull())
            return;
        if (given.isJsonPrimitive()) {
            made.className = given.getAsString();
            return;
        }
        var object = given.getAsJsonObject(); // a list is refused
        if (object.size() == 0)
            return;
        var parts = new ArrayList<String>();
        if (object.has("names"))
            object.getAsJsonArray("names").forEach(each -> parts.add(each.getAsString()));
        else
            parts.add(object.get("name").getAsString());
        made.className = String.join(": ", parts);
        if (made.className.matches("(?s).*[\\r\\n].*"))
            throw new IllegalArgumentException("a class of several lines");
        if (object.has("colorRGB"))
            object.get("colorRGB").getAsInt();
        else if (!object.has("color"))
            throw new IllegalArgumentException("Unable to parse PathClass");
        else if (object.get("color").isJsonArray())
            made.color = GSON.fromJson(object.get("color"), int[].class);
    }

    private static void measure(PathObject made, JsonElement given) {
        var pairs = new HashMap<String, JsonElement>();
        if (given.isJsonObject())
            given.getAsJsonObject().entrySet().forEach(each -> pairs.put(each.getKey(), each.getValue()));
        else
            for (var each : given.getAsJsonArray())
                pairs.put(each.getAsJsonObject().get("name").getAsString(), each.getAsJsonObject().get("value"));
        pairs.forEach((name, value) -> {
            if (!(value instanceof JsonPrimitive number) || !number.isNumber() || !Double.isFinite(number.getAsDouble()))
                throw new IllegalArgumentException("no finite number: " + name); // 0.4
            made.measurements.put(name, number.getAsDouble());
        });
    }

    private static PathObject shaped(PathObject made, JsonObject geometry) {
        var shape = geometry(geometry.get("type").getAsString(), geometry.getAsJsonArray("coordinates"));
        var invalid = new IsValidOp(shape).getValidationError();
        if (invalid != null)
            throw new IllegalArgumentException(invalid.toString());
        // As 0.6 does: a grid of a hundredth of a pixel.
        shape = GeometryPrecisionReducer.reduce(shape, new PrecisionModel(-0.01));
        if (shape.isEmpty())
            throw new IllegalArgumentException("an empty object at (0, 0)"); // shown, with a warning
        made.wkt = shape.toText();
        made.area = shape.getArea();
        return made;
    }

    private static Geometry geometry(String type, JsonArray xy) {
        switch (type) {
            case "Point":
                return FACTORY.createPoint(point(xy));
            case "MultiPoint":
                return FACTORY.createMultiPointFromCoords(points(xy));
            case "LineString":
                return FACTORY.createLineString(points(xy));
            case "Polygon":
                return polygon(xy);
            case "MultiPolygon":
                var parts = new ArrayList<Polygon>();
                xy.forEach(each -> parts.add(polygon(each.getAsJsonArray())));
                return FACTORY.createMultiPolygon(parts.toArray(new Polygon[0]));
            default:
                throw new IllegalArgumentException("does not contain coordinates: " + type);
        }
    }

    private static Polygon polygon(JsonArray rings) {
        var made = new ArrayList<LinearRing>();
        rings.forEach(ring -> made.add(FACTORY.createLinearRing(points(ring.getAsJsonArray())))); // open: refused
        return FACTORY.createPolygon(made.get(0), made.subList(1, made.size()).toArray(new LinearRing[0]));
    }

    private static Coordinate[] points(JsonArray xy) {
        var made = new Coordinate[xy.size()];
        for (int i = 0; i < made.length; i++)
            made[i] = point(xy.get(i).getAsJsonArray());
        return made;
    }

    private static Coordinate point(JsonArray xy) {
        return new Coordinate(xy.get(0).getAsDouble(), xy.get(1).getAsDouble());
    }

    /** A line of JSON for each file: its objects, or why it is refused. */
    public static void main(String[] files) {
        for (var file : files) {
            try {
                System.out.println(new Gson().toJson(Map.of("objects", readObjects(new File(file)))));
            } catch (Exception refused) {
                System.out.println(new Gson().toJson(Map.of("refused", String.valueOf(refused))));
            }
        }
    }
}
