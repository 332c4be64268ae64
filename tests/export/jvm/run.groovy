// Runs the import script as QuPath does, on a project that is read from its file: args are the project and the script.
import com.google.gson.Gson
import com.google.gson.JsonObject
import org.codehaus.groovy.control.CompilerConfiguration

class Hierarchy {
    List objects = [[getID: { -> UUID.randomUUID() }] as Drawn]  // a user's own
    Collection getAllObjects(boolean includeRoot) { new ArrayList(objects) }
    void removeObjects(Collection some, boolean keepChildren) { objects.removeAll(some) }
    void addObjects(Collection some) { objects.addAll(some) }
}
interface Drawn { UUID getID() }
class ImageData {
    Hierarchy hierarchy = new Hierarchy()
}
class Entry {
    String imageName
    ImageData saved = new ImageData()
    int times = 0
    String getOriginalImageName() { imageName }
    ImageData readImageData() { saved }
    void saveImageData(ImageData data) { saved = data; times += 1 }
}
class Project {
    File file
    List<Entry> imageList
    boolean synced
    java.nio.file.Path getPath() { file.toPath() }
    void syncChanges() { synced = true }
}
abstract class InQuPath extends Script {
    static Project open
    Project getProject() { open }
}

def read = new Gson().fromJson(new File(args[0]).text, JsonObject)
def entries = read.getAsJsonArray('images').collect {
    assert it.get('serverBuilder').getAsJsonObject().get('uri').getAsString().startsWith('file:///')
    assert it.get('entryID').getAsLong() <= read.get('lastID').getAsLong()
    new Entry(imageName: it.get('imageName').getAsString())
}
assert read.get('version').getAsString() && read.get('createTimestamp').getAsLong() >= 0
new Gson().fromJson(new File(new File(args[0]).parentFile, 'classifiers/classes.json').text, JsonObject)
    .getAsJsonArray('pathClasses').each { assert it.get('name').getAsString() && it.get('color').getAsInt() < 0 }
InQuPath.open = new Project(file: new File(args[0]), imageList: entries)
2.times {  // a second run replaces what the first put there
    def as_qupath = new CompilerConfiguration(scriptBaseClass: 'InQuPath')
    def shell = new GroovyShell(InQuPath.classLoader, new Binding(args: args.drop(2)), as_qupath)
    shell.evaluate(new File(args[1]))
}
assert InQuPath.open.synced
println new Gson().toJson(entries.collectEntries { [it.imageName, [it.times, it.saved.hierarchy.objects.size()]] })
